"""Why what is dropped at random cannot be recomputed."""

RANDOM = (
    "DARE drops elements at random, and the files do not hold the seed: save the combined adapter and give that one"
)
