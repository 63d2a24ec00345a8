"""`opensora-perflow ui`: a page that samples a tiny student beside its teacher, trains one, and shows a run as it goes on."""
