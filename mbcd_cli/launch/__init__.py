"""Who runs units of work: processes of this machine, Slurm, or Ray; one protocol, and one loop over all of them."""
