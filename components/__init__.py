"""What a host is made of: a module is one component resource, and its settings come in typed."""
