"""A twin and its original in, a twin nearer to the original out, with the record of its distillation."""
