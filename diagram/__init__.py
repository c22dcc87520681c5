"""The platform of a stack as a picture, drawn from what its settings declare: `make diagram`."""
