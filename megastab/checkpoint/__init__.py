"""Complete or not there: DeepSpeed's states, a manifest that says what they are of, and weights any layout can read."""
