"""A recipe in; every stage done, from the conversion to the Hub, and one page that tells it out."""
