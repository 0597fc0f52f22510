"""The classes that run inside actors: shard, worker, learner rank, evaluator, auditor."""
