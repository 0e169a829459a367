"""A name in, a model out: original or twin, from the Hub, a folder, a GGUF file or memory.

Here too: the classes that twins with custom code are loaded as, the forms a polynomial block is saved in, a Llama under
another name, and a twin as a delta of its original.
"""
