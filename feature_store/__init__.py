"""What the data is: the spec, the tables' contracts, Delta reading and writing, quality, embeddings."""
