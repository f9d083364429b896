"""Data for every method: sources with random access, and one pipeline with exact state.

Import the modules you need (`from jaxmodels.data import pydoc_facts, pipeline`). None of them loads
grain, TensorFlow Datasets or tokenizers before a function that needs it is called.
"""
