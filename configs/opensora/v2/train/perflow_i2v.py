# A fragment: what of a video is given, with its weight. i2v: the first frame, the last one, or both.

condition_config = dict(t2v=1, i2v_head=5, i2v_loop=1, i2v_tail=1)
