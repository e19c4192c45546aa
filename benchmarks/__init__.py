"""The engine against its peers and against bare products."""
