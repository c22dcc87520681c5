"""What a stack is like now, against what is declared: `make status` and `make doctor`."""
