"""A fitted block in, modules out; a twin in, a verified folder out, with its report; and reports read back."""
