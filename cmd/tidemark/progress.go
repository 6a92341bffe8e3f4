package main

import (
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// A progress shows how far several things are: bars on a terminal, elsewhere a line
// when one ends. It can be used by several goroutines at a time.
type progress struct {
	out io.Writer

	mu     sync.Mutex
	shown  *mpb.Progress // nil if out is no terminal
	bars   map[string]*mpb.Bar
	closed bool
}

func newProgress(out io.Writer) *progress {
	p := &progress{out: out, bars: make(map[string]*mpb.Bar)}
	if f, ok := out.(*os.File); ok && isTerminal(f) {
		p.shown = mpb.New(mpb.WithOutput(out), mpb.WithWidth(barWidth), mpb.WithAutoRefresh())
	}
	return p
}

const barWidth = 32

// update tells that done of total bytes of a thing are there; total is 0 while it is
// not known.
func (p *progress) update(name string, done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown == nil || p.closed {
		return
	}
	bar := p.bars[name]
	if bar == nil {
		bar = p.shown.AddBar(max(total, 0),
			mpb.PrependDecorators(decor.Name(printable(name), decor.WCSyncSpaceR)),
			mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f"), decor.Name(" "), decor.AverageSpeed(decor.SizeB1024(0), "% .1f")),
		)
		p.bars[name] = bar
	}
	bar.SetTotal(max(total, done), false)
	bar.SetCurrent(done)
}

// end tells what became of a thing.
func (p *progress) end(name, what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if bar := p.bars[name]; bar != nil {
		bar.SetTotal(bar.Current(), true)
	}
	if p.shown == nil {
		fmt.Fprintf(p.out, "%s  %s\n", printable(name), printable(what))
	}
}

// fail tells why a thing did not come: its bar stays where it was.
func (p *progress) fail(name, why string) {
	p.mu.Lock()
	bar := p.bars[name]
	delete(p.bars, name)
	p.mu.Unlock()
	if bar != nil {
		bar.Abort(false)
	}
	p.end(name, why)
}

// Close leaves what is shown as it is.
func (p *progress) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown == nil || p.closed {
		return
	}
	p.closed = true
	for _, bar := range p.bars {
		bar.Abort(false)
	}
	p.shown.Wait()
}

// A transfer shows how far one thing is, on a terminal only.
type transfer struct {
	p     *progress
	name  string
	total int64
	done  int64
}

// newTransfer shows something of total bytes, 0 if that is not known.
func newTransfer(out io.Writer, name string, total int64) *transfer {
	return &transfer{p: newProgress(out), name: name, total: total}
}

// Update tells how far it is.
func (t *transfer) Update(done, total int64) { t.p.update(t.name, done, total) }

// Reader counts what is read from r.
func (t *transfer) Reader(r io.Reader) io.Reader { return &countingReader{t, r} }

// Close ends it.
func (t *transfer) Close() { t.p.Close() }

type countingReader struct {
	t *transfer
	r io.Reader
}

func (r *countingReader) Read(b []byte) (int, error) {
	n, err := r.r.Read(b)
	r.t.done += int64(n)
	r.t.Update(r.t.done, r.t.total)
	return n, err
}
