"""The one JSON of a run: schema, loading, completion, rules. Imports neither torch nor DeepSpeed."""
