package proxy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"

	"tidemark/audit"
	"tidemark/cache"
)

// ScrubOptions configure a Scrubber. All are required.
type ScrubOptions struct {
	Contents *Contents
	Ledger   *audit.Ledger
	Memory   audit.Memory // where it was, across restarts

	// Tags yields what is known: from there content that was wrong is fetched again.
	Tags func(context.Context, audit.TagQuery) iter.Seq2[audit.Tag, error]

	Every time.Duration // from the end of one pass to the next; 0 is never by itself
	Rate  int64         // bytes a second

	Log zerolog.Logger
}

// A Scrubber reads what is stored, compares it with its digests, removes what is
// wrong, and fetches it again where it can. Every finding is in the ledger. Create it
// with NewScrubber; call Run, once.
type Scrubber struct {
	o    ScrubOptions
	busy sync.Mutex // one pass at a time
}

// NewScrubber returns a scrubber. It starts nothing.
func NewScrubber(o ScrubOptions) *Scrubber { return &Scrubber{o: o} }

// ErrScrubbing reports that a pass is under way already.
var ErrScrubbing = errors.New("a scrub is under way already")

// A Finding is content that was not what its digest says.
type Finding struct {
	Digest digest.Digest
	Action string // one of those below
	Err    error
}

// What became of content that was found to be wrong.
const (
	Removed    = "removed" // or gone already: somebody deleted the file
	Refilled   = "refilled"
	Unreadable = "unreadable" // and still there: it is the disk that has trouble
)

// What the scrubber remembers.
const (
	scrubbedAt   = "scrub done"
	scrubbedUpTo = "scrub from" // the digest that was looked at last in a pass that did not end
)

// scrubNoted is how often it is noted how far a pass is.
const scrubNoted = time.Minute

// Run makes a pass whenever one is due, until ctx ends. One that a restart interrupts
// goes on where it was.
func (s *Scrubber) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		wait, err := s.due(ctx)
		if err == nil && wait == 0 {
			err = s.scheduled(ctx)
		}
		switch {
		case errors.Is(err, cache.ErrNotReady):
			wait = scrubReady
		case err != nil && ctx.Err() == nil:
			s.o.Log.Warn().Err(err).Stringer("again_in", scrubRetry).Msg("the scheduled scrub could not be made")
			wait = scrubRetry
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
	return nil
}

const (
	scrubRetry = time.Hour
	scrubReady = 5 * time.Second // while it is not known yet what is stored
	never      = 1<<63 - 1
)

// due is how long it is until the next pass.
func (s *Scrubber) due(ctx context.Context) (time.Duration, error) {
	if s.o.Every == 0 {
		return never, nil
	}
	last, err := s.o.Memory.Recall(ctx, scrubbedAt)
	if err != nil || last == "" {
		return 0, err
	}
	at, err := time.Parse(time.RFC3339, last)
	if err != nil {
		return 0, nil // whatever is written there, it is no time
	}
	return max(0, time.Until(at.Add(s.o.Every))), nil
}

func (s *Scrubber) scheduled(ctx context.Context) error {
	from, err := s.o.Memory.Recall(ctx, scrubbedUpTo)
	if err != nil {
		return err
	}
	report, findings, err := s.pass(ctx, digest.Digest(from), s.o.Rate, func(cache.ScrubReport) {})
	if err != nil {
		return err
	}
	s.o.Log.Info().Int64("checked", report.Checked).Int64("bytes", report.Bytes).Int("wrong", len(findings)).Msg("what is stored was compared with its digests")
	return nil
}

// Scrub makes a pass over everything at a rate in bytes a second, or with 0 the
// configured one. tell is told now and then how far it is.
func (s *Scrubber) Scrub(ctx context.Context, rate int64, tell func(cache.ScrubReport)) (cache.ScrubReport, []Finding, error) {
	if rate == 0 {
		rate = s.o.Rate
	}
	return s.pass(ctx, "", rate, tell)
}

func (s *Scrubber) pass(ctx context.Context, from digest.Digest, rate int64, tell func(cache.ScrubReport)) (cache.ScrubReport, []Finding, error) {
	if !s.busy.TryLock() {
		return cache.ScrubReport{}, nil, ErrScrubbing
	}
	defer s.busy.Unlock()
	var findings []Finding
	var homes map[digest.Digest]home
	noted := time.Now()
	report, err := s.o.Contents.cache.Scrub(ctx, cache.ScrubOptions{
		From: from, Rate: rate,
		Progress: func(r cache.ScrubReport) {
			tell(r)
			if time.Since(noted) >= scrubNoted {
				noted = time.Now()
				s.note(ctx, scrubbedUpTo, string(r.Last))
			}
		},
		Wrong: func(ctx context.Context, d digest.Digest, _ int64, wrong error) {
			if homes == nil {
				homes = s.homes(ctx)
			}
			findings = append(findings, s.found(ctx, d, homes[d], wrong))
		},
	})
	if err != nil {
		if report.Last != "" {
			s.note(context.WithoutCancel(ctx), scrubbedUpTo, string(report.Last))
		}
		return report, findings, err
	}
	s.note(ctx, scrubbedUpTo, "")
	s.note(ctx, scrubbedAt, time.Now().UTC().Format(time.RFC3339))
	return report, findings, nil
}

// note remembers how far it is. If it cannot, a pass is made once more.
func (s *Scrubber) note(ctx context.Context, key, value string) {
	if err := s.o.Memory.Remember(ctx, key, value); err != nil {
		s.o.Log.Warn().Err(err).Msg("how far the scrub is could not be noted")
	}
}

// refillTime bounds the fetching of what was wrong.
const refillTime = 10 * time.Minute

// found fetches again what was wrong, if somebody is known who has it, and has it
// recorded.
func (s *Scrubber) found(ctx context.Context, d digest.Digest, at home, wrong error) Finding {
	f := Finding{d, Removed, wrong}
	if !errors.Is(wrong, cache.ErrMismatch) && !errors.Is(wrong, fs.ErrNotExist) {
		f.Action = Unreadable
	} else if at.ref != (audit.Ref{}) {
		ctx, cancel := context.WithTimeout(ctx, refillTime)
		err := s.o.Contents.refill(ctx, d, at)
		cancel()
		if f.Action = Refilled; err != nil {
			f.Action, f.Err = Removed, fmt.Errorf("%w; it could not be fetched again: %w", wrong, err)
		}
	}
	s.o.Log.Error().Err(f.Err).Str("digest", d.String()).Str("action", f.Action).Msg("stored content was not what its digest says")
	op := audit.Operator{Action: "scrub", Digest: d, New: f.Action}
	if err := s.o.Ledger.Act(ctx, op); err != nil {
		s.o.Log.Error().Err(err).Str("digest", d.String()).Msg("what the scrub found could not be recorded")
	}
	return f
}

// A home is where content can be had.
type home struct {
	ref      audit.Ref
	manifest bool
}

// refill fetches content that was removed.
func (c *Contents) refill(ctx context.Context, d digest.Digest, at home) error {
	repo, err := c.repository(at.ref)
	if err != nil {
		return err
	}
	if at.manifest {
		return c.cache.Ensure(ctx, d, repo.manifest(d))
	}
	return c.cache.Ensure(ctx, d, repo.blob(d))
}

// homes are those of all content that known refs need.
func (s *Scrubber) homes(ctx context.Context) map[digest.Digest]home {
	out := make(map[digest.Digest]home)
	for t, err := range s.o.Tags(ctx, audit.TagQuery{}) {
		if err != nil {
			s.o.Log.Warn().Err(err).Msg("what is known could not be listed: what was wrong may not be fetched again")
			break
		}
		for _, d := range []digest.Digest{t.State.Head, t.State.Served} {
			s.o.Contents.walk(ctx, d, nil, func(d digest.Digest, manifest bool) { out[d] = home{t.Ref, manifest} })
		}
	}
	return out
}
