"""The numerics: the largest or smallest singular triplets of a matrix, to a measured accuracy.

`singular` chooses the method, `triplets` says how good an answer is, `krylov` is the method for large
matrices, and `operators` is all that it knows of a matrix. What triplets are for is the initializers' affair.
"""

from lowrank.linalg.operators import Product, frobenius
from lowrank.linalg.singular import bottom_singular, top_singular
from lowrank.linalg.triplets import Triplets

__all__ = ["Product", "Triplets", "bottom_singular", "frobenius", "top_singular"]
