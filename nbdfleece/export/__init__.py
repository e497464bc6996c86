"""What an NBD client can name."""
