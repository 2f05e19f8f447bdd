"""Set-up of the development environment (`make setup`)."""
