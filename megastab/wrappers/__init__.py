"""DeepSpeed's optimizer wrappers behind one set of verbs; the only room that reads DeepSpeed's private attributes."""
