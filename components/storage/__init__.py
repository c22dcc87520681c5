"""Where volumes come from: the classes of the settings, and what provides them."""
