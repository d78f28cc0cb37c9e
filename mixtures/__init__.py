"""SeqIO mixtures: importing a module of this folder registers what it names."""
