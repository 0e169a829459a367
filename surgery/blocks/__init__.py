"""A network in, its feed-forward blocks out: found by structure, believed once they were recomputed.

A class for each kind of block (:mod:`surgery.blocks.block`) says where its parts are, which weights it has and how its
hidden vector is computed; what differs by kind stands there and nowhere else.
"""
