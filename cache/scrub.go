package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// ScrubOptions configure a pass over what is stored.
type ScrubOptions struct {
	From digest.Digest // what was looked at last; the pass goes on after it
	Rate int64         // bytes a second, 0 for as fast as it goes

	// Progress is told how far the pass is, after every piece of content and now and
	// then in a large one. It may be nil.
	Progress func(ScrubReport)

	// Wrong is told of content that is not what its digest says: with ErrMismatch it
	// was removed, with fs.ErrNotExist somebody else had removed it, with another error
	// it could not be read, and is still there. It may be nil.
	Wrong func(ctx context.Context, dgst digest.Digest, size int64, err error)
}

// A ScrubReport tells how far a pass is.
type ScrubReport struct {
	Checked int64         // pieces of content
	Bytes   int64         // of what was read
	Last    digest.Digest // that was looked at whole
}

// Scrub reads everything that is stored in order of digests, compares it with its
// digest, and removes what is wrong, after a second look. It counts as no use. When ctx
// ends it returns how far it was. What is evicted meanwhile is passed over.
func (c *Cache) Scrub(ctx context.Context, o ScrubOptions) (ScrubReport, error) {
	var report ScrubReport
	c.mu.Lock()
	ready, content := c.index.ready, c.index.lru.Keys()
	c.mu.Unlock()
	if !ready {
		return report, ErrNotReady
	}
	slices.Sort(content)
	tell := func() {
		if o.Progress != nil {
			o.Progress(report)
		}
	}
	pacer := &pacer{ctx: ctx, rate: o.Rate, began: time.Now()}
	for _, dgst := range content {
		if dgst <= o.From {
			continue
		}
		told := report.Bytes
		size, err := c.verify(ctx, dgst, func(n int) error {
			if report.Bytes += int64(n); report.Bytes-told >= scrubTold {
				told = report.Bytes
				tell()
			}
			return pacer.spend(n)
		})
		if ctx.Err() != nil {
			return report, context.Cause(ctx)
		}
		err = c.convict(ctx, dgst, err)
		switch {
		case errors.Is(err, fs.ErrNotExist) && !c.missing(dgst): // it was evicted or removed, as it may be
		case ctx.Err() != nil && !errors.Is(err, ErrMismatch):
			return report, context.Cause(ctx) // the second look was not made: it is looked at again
		case err != nil && o.Wrong != nil:
			o.Wrong(ctx, dgst, size, err)
		}
		report.Checked, report.Last = report.Checked+1, dgst
		tell()
	}
	return report, nil
}

// scrubTold is after how many bytes of one piece of content progress is told.
const scrubTold = 8 << 20

// convict removes content that was found to be wrong if it still is. A copy that came
// after the second look began was not looked at, and stays.
func (c *Cache) convict(ctx context.Context, dgst digest.Digest, found error) error {
	if !errors.Is(found, ErrMismatch) {
		return found
	}
	suspect := c.copyOf(dgst)
	if err := c.Verify(ctx, dgst); !errors.Is(err, ErrMismatch) {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, stored := c.index.get(dgst); !stored || e.copy != suspect {
		return nil
	}
	if err := c.store.Remove(Entry{Digest: dgst}); err != nil {
		return fmt.Errorf("%s is wrong and cannot be removed: %w", dgst, err)
	}
	c.index.remove(dgst)
	c.hot.remove(dgst)
	return found
}

// copyOf tells which copy of dgst is stored, 0 if none is.
func (c *Cache) copyOf(dgst digest.Digest) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, stored := c.index.get(dgst); stored {
		return e.copy
	}
	return 0
}

// A pacer spreads reading over time.
type pacer struct {
	ctx   context.Context // of the pass
	rate  int64
	began time.Time
	spent int64
}

func (p *pacer) spend(n int) error {
	if p.rate <= 0 {
		return p.ctx.Err()
	}
	p.spent += int64(n)
	due := p.began.Add(time.Duration(float64(p.spent) / float64(p.rate) * float64(time.Second)))
	select {
	case <-time.After(time.Until(due)):
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}
