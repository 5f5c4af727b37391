"""Token by token: what a language model's runtime must offer, and the loops over it.

The loops know token ids only. Needs numpy alone.
"""
