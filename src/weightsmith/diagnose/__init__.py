from weightsmith.diagnose.rank import effective_rank
