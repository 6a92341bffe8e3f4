package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit/taglog"
)

// ErrRollback reports a log that does not contain what was signed before: the
// database is older than the anchor, or was changed. Images are still served;
// nothing is signed any more.
var ErrRollback = errors.New("the log does not contain what was signed before")

// A Signer signs checkpoints of a log, soon after it has grown, and keeps the
// last one in an anchor file outside the database. Before every signature it
// checks that the log still contains what was signed last.
type Signer struct {
	log    Log
	key    *Key
	anchor string
	now    func() time.Time
	logger zerolog.Logger
	grown  chan struct{} // holds one wake-up

	onSigned func()
	restored bool // what was signed last has been read; Run's own

	mu     sync.Mutex
	signed Signed
	err    error         // why nothing is signed now
	tried  chan struct{} // closed when it was signed, or could not be
	since  time.Time     // when the log grew beyond what is signed, zero if it did not
}

// Intact tells whether log contains what was signed last with key: nil, or what
// does not fit, which is ErrRollback if it is that.
func Intact(ctx context.Context, log Log, key *Key, anchor string) error {
	return NewSigner(log, key, anchor, nil, zerolog.Nop()).restore(ctx)
}

// OnSigned has f called after every signature. It is called before Run.
func (s *Signer) OnSigned(f func()) { s.onSigned = f }

// Signed is a signed checkpoint.
type Signed struct {
	Note []byte // c2sp.org/tlog-checkpoint, empty before the first
	Tree tlog.Tree
	At   time.Time
}

// ErrNoKey reports a log whose key is gone. It is not signed any more, for a new
// key would look like another log to everyone who keeps the old verifier.
var ErrNoKey = errors.New("the log's key is missing: put log.key back")

// NewSigner returns a signer of log, whose last checkpoint is also kept in the
// file anchor. Without a key, nil, nothing is signed and Err says so. now is the
// clock, nil for time.Now. It starts nothing.
func NewSigner(log Log, key *Key, anchor string, now func() time.Time, logger zerolog.Logger) *Signer {
	s := &Signer{log: log, key: key, anchor: anchor, now: now, logger: logger, grown: make(chan struct{}, 1), tried: make(chan struct{}), onSigned: func() {}}
	if now == nil {
		s.now = time.Now
	}
	if key == nil {
		s.err = ErrNoKey
	}
	return s
}

// Grown tells the signer that the log has grown. It does not block.
func (s *Signer) Grown() {
	s.mu.Lock()
	if s.since.IsZero() {
		s.since = s.now()
	}
	s.mu.Unlock()
	select {
	case s.grown <- struct{}{}:
	default:
	}
}

const (
	signEvery = time.Second    // at most, while the log grows
	signAtAll = 24 * time.Hour // at least: a checkpoint says that the log is alive
	signRetry = time.Minute    // after it could not be signed
)

// Run signs until ctx ends, and once more then. That nothing can be signed is
// told by Status, not by an error: images are served without it.
func (s *Signer) Run(ctx context.Context) error {
	if s.key == nil {
		s.logger.Error().Err(ErrNoKey).Msg("the log is not signed; images are served, but nothing new can be proven")
		<-ctx.Done()
		return nil
	}
	timer := time.NewTimer(0) // what grew before the last stop
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-s.grown:
		case <-ctx.Done():
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			s.try(ctx)
			return nil
		}
		s.try(ctx)
		if s.Err() != nil {
			timer.Reset(signRetry)
		} else {
			timer.Reset(signAtAll)
		}
		select {
		case <-time.After(signEvery):
		case <-ctx.Done():
		}
	}
}

// restore reads what was signed last, from the anchor and from the database.
func (s *Signer) restore(ctx context.Context) error {
	anchored, err := os.ReadFile(s.anchor)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read anchor: %w", err)
	}
	saved, err := s.log.Checkpoint(ctx)
	if err != nil {
		return fmt.Errorf("read the last checkpoint: %w", err)
	}
	for _, note := range [][]byte{anchored, saved} {
		if len(note) == 0 {
			continue
		}
		c, err := taglog.Open(note, s.key.Verifier)
		if err != nil {
			return fmt.Errorf("the last checkpoint: %w", err)
		}
		if err := s.contains(ctx, c.Tree); err != nil {
			return err
		}
		s.mu.Lock()
		if c.N >= s.signed.Tree.N {
			s.signed = Signed{Note: note, Tree: c.Tree}
		}
		s.mu.Unlock()
	}
	return nil
}

// Follows checks that the log contains what before, a checkpoint that was published,
// says: nil, ErrRollback if it does not, or why that could not be told. What is not
// signed by this log says nothing about it.
func (s *Signer) Follows(ctx context.Context, before []byte) error {
	c, err := taglog.Open(before, s.key.Verifier)
	if err != nil {
		return nil
	}
	if err := s.contains(ctx, c.Tree); err != nil {
		return fmt.Errorf("a checkpoint of %d entries: %w", c.N, err)
	}
	return nil
}

// contains checks that the log, as it is in the store, begins with old.
func (s *Signer) contains(ctx context.Context, old tlog.Tree) error {
	tree, err := s.log.Tree(ctx)
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	return Contains(s.log, tree.N, old)
}

// Contains checks that a log of so many entries begins with old, and tells one
// that does not, ErrRollback, from one that could not be read.
func Contains(log tlog.HashReader, entries int64, old tlog.Tree) error {
	if entries < old.N {
		return fmt.Errorf("%w: it has %d entries, a checkpoint was signed of %d", ErrRollback, entries, old.N)
	}
	err := taglog.Check(old, log)
	if errors.Is(err, taglog.ErrRoot) {
		return fmt.Errorf("%w: %w", ErrRollback, err)
	}
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	return nil
}

// try signs if there is something to sign. After a rollback it no longer does,
// and never before what was signed last is known.
func (s *Signer) try(ctx context.Context) {
	if errors.Is(s.Err(), ErrRollback) {
		return
	}
	if !s.restored {
		if err := s.restore(ctx); err != nil {
			s.failed(err)
			return
		}
		s.restored = true
	}
	if err := s.sign(ctx); err != nil {
		s.failed(err)
		return
	}
	s.mu.Lock()
	s.err = nil
	s.mu.Unlock()
}

func (s *Signer) failed(err error) {
	s.mu.Lock()
	known := s.err != nil && s.err.Error() == err.Error()
	s.err = err
	s.tell()
	if s.since.IsZero() {
		s.since = s.now() // at the latest from here on
	}
	s.mu.Unlock()
	if !known {
		s.logger.Error().Err(err).Msg("the log is not signed; images are served, but nothing new can be proven")
	}
}

func (s *Signer) sign(ctx context.Context) error {
	s.mu.Lock()
	last, since := s.signed, s.since
	s.since = time.Time{} // what grows from here on may not be in the tree read below
	s.mu.Unlock()
	err := s.signAfter(ctx, last)
	if err != nil && !since.IsZero() {
		s.mu.Lock()
		s.since = since
		s.mu.Unlock()
	}
	return err
}

func (s *Signer) signAfter(ctx context.Context, last Signed) error {
	tree, err := s.log.Tree(ctx)
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	if tree.N == 0 || tree.N == last.Tree.N && s.now().Sub(last.At) < signAtAll {
		return nil
	}
	if err := s.contains(ctx, last.Tree); err != nil {
		return err
	}
	if err := Contains(s.log, tree.N, tree); err != nil {
		return err
	}
	note, err := taglog.Sign(s.key.Origin(), tree, s.key.Signer)
	if err != nil {
		return fmt.Errorf("sign: %w", err)
	}
	now := s.now().UTC()
	if err := s.log.SaveCheckpoint(ctx, tree, note, now); err != nil {
		return fmt.Errorf("save checkpoint: %w", err)
	}
	if err := WriteFile(s.anchor, note, 0o644); err != nil {
		return fmt.Errorf("write anchor: %w", err)
	}
	s.mu.Lock()
	s.signed = Signed{note, tree, now}
	s.tell()
	s.mu.Unlock()
	s.onSigned()
	return nil
}

// tell wakes whoever waits for a signature. s.mu is held.
func (s *Signer) tell() {
	close(s.tried)
	s.tried = make(chan struct{})
}

// Covering returns a signed checkpoint of at least size entries. It waits for one
// until ctx ends, or until signing fails.
func (s *Signer) Covering(ctx context.Context, size int64) (Signed, error) {
	for {
		s.mu.Lock()
		signed, err, tried := s.signed, s.err, s.tried
		s.mu.Unlock()
		switch {
		case len(signed.Note) > 0 && signed.Tree.N >= size:
			return signed, nil
		case err != nil:
			return Signed{}, fmt.Errorf("the log is not signed: %w", err)
		}
		select {
		case <-tried:
		case <-ctx.Done():
			return Signed{}, fmt.Errorf("the log is not signed yet: %w", context.Cause(ctx))
		}
	}
}

// Key is the key of the log, nil if it is missing.
func (s *Signer) Key() *Key { return s.key }

// Last returns the checkpoint signed last.
func (s *Signer) Last() Signed {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.signed
}

// UnsignedSince is when the log grew beyond what is signed, zero if it did not.
func (s *Signer) UnsignedSince() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.since
}

// Err is why nothing is signed at present, or nil.
func (s *Signer) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// VKey is the verifier of the checkpoints, in signed-note's form; "" without a key.
func (s *Signer) VKey() string {
	if s.key == nil {
		return ""
	}
	return s.key.VKey
}
