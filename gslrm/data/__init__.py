"""Stage 2's data: posed, masked views of sample folders."""
