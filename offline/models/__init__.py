"""Model families: where their tensors are, how to read them and how to run them one layer at a time."""
