package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/opencontainers/go-digest"
)

// An index knows what is stored, in the order in which it was used, and how
// much room there is. It is passive: the Cache's mutex guards all of it.
//
// The order survives a restart in the store's Used times. Both are renewed
// only every few minutes (touchEvery), always together.
type index struct {
	lru      *simplelru.LRU[digest.Digest, *indexed]
	bytes    int64                   // of all that lru holds
	partials map[digest.Digest]int64 // left by fills that ended early; the first to go
	idle     int64                   // bytes of partials
	reserved int64                   // bytes promised to fills that run
	ready    bool                    // everything stored is known; what is not here is absent
	pinned   bool                    // what is pinned is marked
	gen      uint64                  // of the marks
	copies   uint64                  // that have come
	fresh    grip                    // of what arrives, until the pins are looked at anew
	grips    [firm + 1]int           // how many entries of each
	sizes    [firm + 1]int64         // and their bytes
}

type indexed struct {
	size int64
	used time.Time
	grip grip
	gen  uint64 // in which grip was marked
	copy uint64 // what is removed and comes again is another copy
}

func newIndex() *index {
	lru, err := simplelru.NewLRU[digest.Digest, *indexed](math.MaxInt, nil) // bytes decide, not entries
	if err != nil {
		panic("cache: " + err.Error())
	}
	return &index{lru: lru, partials: make(map[digest.Digest]int64)}
}

func (x *index) get(dgst digest.Digest) (*indexed, bool) { return x.lru.Peek(dgst) }

// add makes dgst the most recently used.
func (x *index) add(dgst digest.Digest, size int64, used time.Time) {
	x.copies++
	e := &indexed{size: size, used: used, grip: x.fresh, gen: x.gen, copy: x.copies}
	if old, ok := x.lru.Peek(dgst); ok {
		x.count(old, -1)
		e.grip, e.gen, e.copy = old.grip, old.gen, old.copy
	}
	x.lru.Add(dgst, e)
	x.count(e, 1)
}

// hold changes how firmly an entry is kept.
func (x *index) hold(e *indexed, g grip, gen uint64) {
	x.count(e, -1)
	e.grip, e.gen = g, gen
	x.count(e, 1)
}

// count takes an entry into account, or with -1 out of it.
func (x *index) count(e *indexed, n int) {
	x.grips[e.grip] += n
	x.sizes[e.grip] += int64(n) * e.size
	x.bytes += int64(n) * e.size
}

func (x *index) remove(dgst digest.Digest) {
	if e, ok := x.lru.Peek(dgst); ok {
		x.count(e, -1)
		x.lru.Remove(dgst)
	}
}

func (x *index) addPartial(dgst digest.Digest, size int64) {
	x.removePartial(dgst)
	if size > 0 {
		x.partials[dgst] = size
		x.idle += size
	}
}

func (x *index) removePartial(dgst digest.Digest) {
	x.idle -= x.partials[dgst]
	delete(x.partials, dgst)
}

func (x *index) release(n int64) { x.reserved -= n }

// rebuild finds what the store holds. Until it is done, look-ups ask the store
// and nothing is evicted.
func (c *Cache) rebuild(ctx context.Context) error {
	var found []Entry
	var incomplete error
	for e, err := range c.store.Walk(ctx) {
		if err != nil {
			incomplete = fmt.Errorf("index: %w", err)
			continue
		}
		found = append(found, e)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	slices.SortFunc(found, func(a, b Entry) int { return a.Used.Compare(b.Used) })

	c.mu.Lock()
	defer c.mu.Unlock()
	meanwhile := c.index.lru // used or committed while we walked: more recent than all found
	c.index.lru, c.index.bytes, c.index.grips, c.index.sizes = newIndex().lru, 0, [firm + 1]int{}, [firm + 1]int64{}
	for _, e := range found {
		switch {
		case !e.Partial:
			c.index.add(e.Digest, e.Size, e.Used)
		case c.fills[e.Digest] != nil || meanwhile.Contains(e.Digest):
			// It is being finished, or was.
		case c.now().Sub(e.Used) > partialsKept:
			if err := c.store.Remove(e); err != nil {
				c.log.Warn().Err(err).Str("digest", e.Digest.String()).Msg("unfinished content could not be removed")
			}
		default:
			c.index.addPartial(e.Digest, e.Size)
		}
	}
	for _, dgst := range meanwhile.Keys() {
		e, _ := meanwhile.Peek(dgst)
		c.index.add(dgst, e.size, e.used)
	}
	c.index.ready = true
	c.maxBytes = c.budget(c.index.bytes + c.index.idle)
	return incomplete
}

// partialsKept is how long unfinished content waits to be resumed.
const partialsKept = 24 * time.Hour

// reserve makes room for content of total bytes that f is going to write, or
// says errUncached. It can be called again with a larger total.
func (c *Cache) reserve(f *fill, total int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	need := total - f.reserved
	if need <= 0 {
		return nil
	}
	if !c.evict(need) {
		return fmt.Errorf("fill %s of %d bytes: %w", f.dgst, total, errUncached)
	}
	f.reserved += need
	c.index.reserved += need
	return nil
}

// evict removes what was not used for the longest time until need more bytes
// fit into the budget and the disk, and tells whether they do. What is pinned
// softly goes when nothing else is left, what is pinned firmly never. c.mu is held,
// also while files are removed: a fill of the same digest must not begin
// between the two.
func (c *Cache) evict(need int64) bool {
	x := c.index
	// Nothing is removed for content that would not fit when all that may go is gone.
	if need > 0 && need > c.maxBytes-x.reserved-x.sizes[firm] {
		return false
	}
	free, err := c.store.Free()
	if err != nil {
		c.log.Warn().Err(err).Msg("free space is unknown; only the budget is kept")
		free = math.MaxInt64
	} else {
		for _, f := range c.fills {
			free -= max(0, f.reserved-f.frontier()) // promised, not yet written
		}
		if in := c.intake; in != nil {
			free -= in.reserved - in.written
		}
	}
	if need > 0 && free+x.bytes-x.sizes[firm]+x.idle-need < c.minFree {
		return false // others have filled the disk; what is here is no help, and is needed
	}
	fits := func() bool {
		return x.bytes+x.idle+x.reserved+need <= c.maxBytes && free-need >= c.minFree
	}
	for dgst, size := range x.partials {
		if fits() {
			return true
		}
		c.remove(Entry{Digest: dgst, Size: size, Partial: true})
		x.removePartial(dgst)
		free += size
	}
	if !x.ready || !x.pinned {
		// Before everything is known the oldest is not known either.
		return fits() || free-need >= c.minFree
	}
	for most := loose; most < firm; most++ {
		for x.evictable(most) > 0 && !fits() {
			dgst, e, _ := x.lru.GetOldest()
			if e.grip > most {
				x.lru.Get(dgst) // out of the way, in the order it was
				continue
			}
			c.remove(Entry{Digest: dgst, Size: e.size})
			x.remove(dgst)
			c.hot.remove(dgst)
			c.evicted.Add(e.size)
			free += e.size
		}
	}
	return fits()
}

// evictable is how many entries may go that are held no firmer than most.
func (x *index) evictable(most grip) (n int) {
	for g := loose; g <= most; g++ {
		n += x.grips[g]
	}
	return n
}

func (c *Cache) remove(e Entry) {
	if err := c.store.Remove(e); err != nil {
		c.log.Warn().Err(err).Str("digest", e.Digest.String()).Msg("content could not be removed; it is found again at the next start")
	}
}

// truncated tells stored content that is not of the size it was committed with.
func (c *Cache) truncated(dgst digest.Digest, e Entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	x, ok := c.index.get(dgst)
	return ok && x.size != e.Size
}

// drop removes stored content that is wrong.
func (c *Cache) drop(dgst digest.Digest, why string) {
	c.log.Error().Str("digest", dgst.String()).Msg(why + "; it is removed and fetched again")
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(Entry{Digest: dgst})
	c.index.remove(dgst)
	c.hot.remove(dgst)
}

// missing drops dgst from the index if the store does not have it, and tells whether it
// was so.
func (c *Cache) missing(dgst digest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, indexed := c.index.get(dgst); !indexed {
		return false
	}
	file, _, err := c.store.Open(dgst)
	if err == nil {
		file.Close()
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	c.index.remove(dgst)
	c.hot.remove(dgst)
	return true
}

// forget drops dgst from the index after its file was found missing.
func (c *Cache) forget(dgst digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.index.remove(dgst)
	c.hot.remove(dgst)
}

// touchEvery is how often a use of the same content is recorded. Rollouts last
// longer than this, and a disk should not be written to for each read.
const touchEvery = 2 * time.Minute

// used records a use of stored content that is not a manifest.
func (c *Cache) used(dgst digest.Digest, e Entry) {
	now := c.now()
	c.mu.Lock()
	x, ok := c.index.get(dgst)
	if ok && now.Sub(x.used) < touchEvery || !ok && c.index.ready { // evicted while it was opened
		c.mu.Unlock()
		return
	}
	c.index.add(dgst, e.Size, now)
	c.mu.Unlock()
	c.touchStore(dgst, now)
}

// touchManifest records a use of m and of everything it refers to, in this
// order, so that a manifest is always evicted before its layers and no image is
// torn.
func (c *Cache) touchManifest(m *Manifest) {
	now := c.now()
	c.mu.Lock()
	x, ok := c.index.get(m.Digest)
	if ok && now.Sub(m.touched()) < touchEvery {
		c.mu.Unlock()
		return
	}
	if ok {
		c.index.add(m.Digest, x.size, now)
	}
	m.setTouched(now)
	c.mu.Unlock()
	c.touchStore(m.Digest, now)
	c.touchRefers(m, now)
}

func (c *Cache) touchRefers(m *Manifest, now time.Time) {
	// Later than what refers to them also on disk, where only times tell.
	now = now.Add(time.Millisecond)
	for _, r := range m.Refers {
		c.mu.Lock()
		x, ok := c.index.get(r.Digest)
		if ok {
			c.index.add(r.Digest, x.size, now)
		}
		c.mu.Unlock()
		if !ok {
			continue
		}
		c.touchStore(r.Digest, now)
		if child := c.stored(r.Digest, m.Index); child != nil {
			c.touchRefers(child, now)
		}
	}
}

func (c *Cache) touchStore(dgst digest.Digest, now time.Time) {
	if err := c.store.Touch(dgst, now); err != nil {
		c.log.Warn().Err(err).Str("digest", dgst.String()).Msg("use could not be recorded; it may be evicted early")
	}
}
