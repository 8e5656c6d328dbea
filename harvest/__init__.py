"""Stage 1: run models once and store their activations, aligned row by row."""
