"""Complete or not there: masters and moments by their place in the whole matrices, which any layout can read; nothing is unpickled."""
