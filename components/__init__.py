"""What a host is made of: a module is one component resource, named after it. Settings come in as typed arguments."""
