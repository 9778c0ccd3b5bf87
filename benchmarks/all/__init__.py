"""All benchmarks in one command, on one page: training, generation, swaps, queues of styles, start-up, scaling."""
