from kvkeye._host_ngram_py import NgramIndex as NgramIndex
from kvkeye._host_py import BlockPool as BlockPool
