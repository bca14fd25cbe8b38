from kvkeye._host_py import BlockPool as BlockPool
