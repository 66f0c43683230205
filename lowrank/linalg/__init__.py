"""The numerics: the largest or smallest singular triplets of a matrix, to a measured accuracy.

`singular` chooses the method, `triplets` says how good an answer is, `krylov` is the method for large
matrices, and `operators` is all that it knows of a matrix. `closest` brings a product of two factors to a
smaller rank. What triplets are for is the initializers' affair.
"""

from lowrank.linalg.closest import closest_product
from lowrank.linalg.operators import Product, frobenius
from lowrank.linalg.singular import bottom_singular, top_singular
from lowrank.linalg.triplets import Triplets

__all__ = ["Product", "Triplets", "bottom_singular", "closest_product", "frobenius", "top_singular"]
