package relay

const (
	// bufferSize is what one read takes at most, and what a direction holds for
	// a slow receiver at most.
	bufferSize = 32 << 10
	// spareBuffers is how many unused ones a loop keeps: 2 MiB.
	spareBuffers = 64
	// sparePipes is how many empty pipes a loop keeps open, 2 descriptors each.
	sparePipes = 32
)

// A buffer holds what a receiver did not take yet.
type buffer struct {
	bytes      [bufferSize]byte
	start, end int
}

// buffers is a pool of a loop's own. There are never more of them than
// directions with a slow receiver.
type buffers struct{ spare []*buffer }

// hold takes a buffer and copies p, which is no longer than bufferSize, to it.
func (b *buffers) hold(p []byte) *buffer {
	var got *buffer
	if n := len(b.spare); n > 0 {
		got, b.spare = b.spare[n-1], b.spare[:n-1]
	} else {
		got = new(buffer)
	}
	got.start, got.end = 0, copy(got.bytes[:], p)
	return got
}

func (b *buffers) release(old *buffer) {
	if len(b.spare) < spareBuffers {
		b.spare = append(b.spare, old)
	}
}

// A pipe takes bytes from one socket to another inside the kernel.
type pipe struct {
	r, w int32
	size int // what it holds at most
	held int // what it holds now
}

// pipes is a pool of a loop's own.
type pipes struct {
	spare []*pipe
	open  int
	most  int
}

// take returns an empty pipe, or nil when there is none to be had: the
// direction then goes on with buffers.
func (p *pipes) take(k kernel) *pipe {
	if n := len(p.spare); n > 0 {
		got := p.spare[n-1]
		p.spare = p.spare[:n-1]
		return got
	}
	if p.open >= p.most {
		return nil
	}
	r, w, size, err := k.openPipe()
	if err != 0 {
		return nil
	}
	p.open++
	return &pipe{r: r, w: w, size: size}
}

// release gives a pipe back. One that still has bytes of a connection in it is
// closed, as are more than a few spare ones.
func (p *pipes) release(k kernel, old *pipe) {
	if old.held == 0 && len(p.spare) < sparePipes {
		p.spare = append(p.spare, old)
		return
	}
	k.closePipe(old.r, old.w)
	p.open--
}

// closeSpare closes all unused pipes.
func (p *pipes) closeSpare(k kernel) {
	for _, s := range p.spare {
		k.closePipe(s.r, s.w)
		p.open--
	}
	p.spare = nil
}
