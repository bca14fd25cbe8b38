"""Model families over `kvkeye.layers`. Importing this package loads none of them."""
