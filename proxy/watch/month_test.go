package watch_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/rs/zerolog"

	"tidemark/audit"
	"tidemark/audit/diff"
	"tidemark/audit/notify"
	"tidemark/audit/sqlite"
	"tidemark/proxy/watch"
)

var (
	monthRefs = flag.Int("month.refs", 60, "tags of the synthetic month")
	monthSeed = flag.Uint64("month.seed", 1, "of the synthetic month")
)

const (
	hour  = time.Hour
	day   = 24 * hour
	month = 30 * day
)

// A meaning is what a tag means from a time on, "" for nothing.
type meaning struct {
	at     time.Time
	digest digest.Digest
}

// A history is what registries had in a time: every tag with what it meant when, and
// the manifests themselves. It is made up, from a seed, at the pace at which tags of
// real registries move (AUDIT.md, A7), and with what goes wrong there every day.
type history struct {
	rnd        *rand.Rand
	start, end time.Time
	content    map[digest.Digest][]byte
	tags       map[audit.Ref][]meaning
	incidents  []incident
}

// An incident is what must not be missed.
type incident struct {
	repository string
	at         time.Time
	tags       []string // that were overwritten
}

func (h *history) put(v any) (digest.Digest, int64) {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	d := digest.FromBytes(b)
	h.content[d] = b
	return d, int64(len(b))
}

// A build is what an image is made of.
type build struct {
	base              string // its layer
	baseName          string
	app               string // its layer
	version, revision string
	entrypoint        string
}

func (h *history) image(arch string, b build) ocispec.Descriptor {
	p := ocispec.Platform{OS: "linux", Architecture: arch}
	cfg := ocispec.Image{Platform: p, History: []ocispec.History{{CreatedBy: "ADD rootfs " + b.base}, {CreatedBy: "COPY app"}}}
	cfg.Config.Entrypoint = []string{b.entrypoint}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Annotations: make(map[string]string)}
	m.SchemaVersion = 2
	for k, v := range map[string]string{ocispec.AnnotationVersion: b.version, ocispec.AnnotationRevision: b.revision, ocispec.AnnotationBaseImageName: b.baseName} {
		if v != "" {
			m.Annotations[k] = v
		}
	}
	for _, l := range []string{b.base + arch, b.app + arch} {
		cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, digest.FromString("tar "+l))
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString(l), Size: 40 << 20})
	}
	m.Config.MediaType = ocispec.MediaTypeImageConfig
	m.Config.Digest, m.Config.Size = h.put(cfg)
	d := ocispec.Descriptor{MediaType: m.MediaType, Platform: &p}
	d.Digest, d.Size = h.put(m)
	return d
}

func (h *history) index(images ...ocispec.Descriptor) digest.Digest {
	x := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: images}
	x.SchemaVersion = 2
	d, _ := h.put(x)
	return d
}

// mean has tags mean a digest from a time on.
func (h *history) mean(repository string, at time.Time, d digest.Digest, tags ...string) {
	upstream, name, _ := strings.Cut(repository, "/")
	for i, tag := range tags {
		ref := audit.Ref{Upstream: upstream, Repository: name, Tag: tag}
		h.tags[ref] = append(h.tags[ref], meaning{at.Add(time.Duration(i) * time.Second), d})
	}
}

// publish has tags mean a new build: arm64 is ready hours after amd64, and the index is
// put together each time.
func (h *history) publish(repository string, at time.Time, before, now build, tags ...string) {
	amd := h.image("amd64", now)
	if before != (build{}) {
		h.mean(repository, at, h.index(amd, h.image("arm64", before)), tags...)
		at = at.Add(hour + h.within(5*hour))
	}
	h.mean(repository, at, h.index(amd, h.image("arm64", now)), tags...)
}

func (h *history) within(d time.Duration) time.Duration { return time.Duration(h.rnd.Int64N(int64(d))) }

// times are when something happens that happens so often a month, by chance.
func (h *history) times(perMonth float64) (out []time.Time) {
	for at := h.start; ; {
		at = at.Add(time.Duration(h.rnd.ExpFloat64() / perMonth * float64(month)))
		if at.After(h.end) {
			return out
		}
		out = append(out, at)
	}
}

// moving is a base image that moves so often a month. It returns when, the first time
// being that of the start.
func (h *history) moving(name string, perMonth float64) (times []time.Time) {
	times = append([]time.Time{h.start}, h.times(perMonth)...)
	before := build{}
	for i, at := range times {
		b := build{base: layer(name, i), app: "nothing", entrypoint: "sh"}
		repository, tag, _ := strings.Cut(name, ":")
		h.publish("docker.io/library/"+repository, at, before, b, tag)
		before = b
	}
	return times
}

func layer(base string, n int) string { return fmt.Sprintf("%s rootfs %d ", base, n) }

// steps merges what happens to an image: what its base does, hours later, and what its
// publisher does.
type step struct {
	at   time.Time
	base int // the base's, or -1
}

func (h *history) steps(bases []time.Time, own float64) (out []step) {
	for i, at := range bases[1:] {
		out = append(out, step{at.Add(hour + h.within(20*hour)), i + 1})
	}
	for _, at := range h.times(own) {
		out = append(out, step{at, -1})
	}
	slices.SortFunc(out, func(a, b step) int { return a.at.Compare(b.at) })
	return out
}

// official is one of Docker's official images: rebuilt under all its tags with its base,
// half of what its publisher does is a release, the other half a rebuild.
func (h *history) official(name, baseName string, bases []time.Time) {
	repository := "docker.io/library/" + name
	b := build{base: layer(baseName, 0), baseName: baseName, app: name + " 0 ", version: "1.4.0", revision: "0", entrypoint: name}
	tags := []string{"latest", "1", "1.4", "1.4.0"}
	h.publish(repository, h.start, build{}, b, tags...)
	patch := 0
	for n, s := range h.steps(bases, .9) {
		before := b
		switch {
		case s.base >= 0:
			b.base = layer(baseName, s.base)
		case h.rnd.IntN(2) == 0:
			patch++
			b.version, b.revision, b.app = fmt.Sprintf("1.4.%d", patch), fmt.Sprint(n), fmt.Sprintf("%s %d ", name, n)
			tags = []string{"latest", "1", "1.4", b.version}
			if h.rnd.IntN(30) == 0 {
				b.entrypoint = fmt.Sprintf("%s %d", name, n)
			}
		default:
			b.app, b.revision = fmt.Sprintf("%s %d ", name, n), fmt.Sprint(n)
		}
		h.publish(repository, s.at, before, b, tags...)
	}
}

// vendor is an image of its publisher: releases under tags of their own, which stay, and
// floating ones, which go on. One of five says nothing of its version.
func (h *history) vendor(repository string, perMonth float64) {
	says := h.rnd.IntN(5) > 0
	b := build{base: layer("vendor", 0), app: repository, entrypoint: "app"}
	for n, at := range append([]time.Time{h.start.Add(-2 * hour), h.start.Add(-hour), h.start}, h.times(perMonth)...) {
		before := b
		version := fmt.Sprintf("2.%d.%d", n/4, n%4)
		b.app, b.base = fmt.Sprintf("%s %d ", repository, n), layer("vendor", n/3)
		if says {
			b.version, b.revision = version, fmt.Sprint(n)
		}
		if h.rnd.IntN(50) == 0 {
			b.entrypoint = fmt.Sprintf("app%d", n)
		}
		if n == 0 {
			before = build{}
		}
		h.publish(repository, at, before, b, "latest", fmt.Sprintf("v2.%d", n/4))
		h.mean(repository, at.Add(6*hour), h.index(h.image("amd64", b), h.image("arm64", b)), "v"+version)
	}
}

// nightly is an image that is built every night, and says so.
func (h *history) nightly(repository string) {
	for n, at := 0, h.start; at.Before(h.end); n, at = n+1, at.Add(day+h.within(hour)-hour/2) {
		b := build{base: layer("n", 0), app: fmt.Sprint(repository, n), version: "nightly", revision: fmt.Sprint(n), entrypoint: "app"}
		h.mean(repository, at, h.index(h.image("amd64", b)), "nightly")
	}
}

// old is an image that nobody works on any more.
func (h *history) old(repository string) {
	b := build{base: layer("old", 0), app: repository, version: "1.0.0", entrypoint: "app"}
	h.mean(repository, h.start, h.index(h.image("amd64", b)), "latest", "1.0.0")
}

// everyday is what goes wrong without being an incident, in a month of so many tags:
// edges that disagree, a full version pushed again, a release taken back, a deletion.
func (h *history) everyday(refs int, from time.Time) {
	all := slices.SortedFunc(maps.Keys(h.tags), func(a, b audit.Ref) int { return strings.Compare(a.String(), b.String()) })
	pick := func(is func(audit.Ref) bool) (audit.Ref, string) {
		for {
			if ref := all[h.rnd.IntN(len(all))]; is(ref) && h.meansAt(ref, from) != "" {
				return ref, ref.Upstream + "/" + ref.Repository
			}
		}
	}
	anyOf := func(audit.Ref) bool { return true }
	vendors := func(r audit.Ref) bool { return r.Upstream == "ghcr.io" && strings.HasPrefix(r.Repository, "vendor") }
	times := func(n int, do func(at time.Time)) {
		for range (n*refs + 999) / 1000 {
			do(from.Add(day + h.within(month-3*day)))
		}
	}
	other := func(at time.Time) digest.Digest {
		return h.index(h.image("amd64", build{base: layer("other", 0), app: at.String(), entrypoint: "app"}))
	}
	flap := func(changes int) func(at time.Time) {
		return func(at time.Time) {
			ref, repository := pick(anyOf)
			is, next := h.meansAt(ref, at), other(at)
			for i := range changes {
				at = at.Add(3 * time.Minute)
				h.mean(repository, at, []digest.Digest{next, is}[i%2], ref.Tag)
			}
		}
	}
	times(10, flap(2))
	times(2, flap(8))
	times(3, func(at time.Time) { // taken back within hours
		ref, repository := pick(vendors)
		is := h.meansAt(ref, at)
		h.mean(repository, at, other(at), ref.Tag)
		h.mean(repository, at.Add(2*hour), is, ref.Tag)
	})
	times(2, func(at time.Time) { // pushed again, with the same content but for a time stamp
		ref, repository := pick(func(r audit.Ref) bool { return vendors(r) && audit.FullVersion(r.Tag) })
		h.mean(repository, at, other(at), ref.Tag)
	})
	times(3, func(at time.Time) {
		ref, repository := pick(vendors)
		h.mean(repository, at, "", ref.Tag)
	})
}

// attack has an incident: tags that stood from the start on are overwritten.
func (h *history) attack(repository string, at time.Time, stood map[string]string, evil map[string]string) {
	b := build{base: layer("vendor", 0), version: "2.1.20", entrypoint: "app"}
	for _, tag := range slices.Sorted(maps.Keys(stood)) {
		b.app = stood[tag]
		h.mean(repository, h.start, h.index(h.image("amd64", b), h.image("arm64", b)), tag)
	}
	in := incident{repository: repository, at: at}
	for i, tag := range slices.Sorted(maps.Keys(evil)) {
		b.app = evil[tag]
		h.mean(repository, at.Add(time.Duration(i)*time.Second), h.index(h.image("amd64", b), h.image("arm64", b)), tag)
		if stood[tag] != "" {
			in.tags = append(in.tags, tag)
		}
	}
	h.incidents = append(h.incidents, in)
}

// newHistory makes up registries with about so many tags, from start on: a time before
// the month, and the month.
func newHistory(seed uint64, refs int, start, from time.Time) *history {
	h := &history{
		rnd: rand.New(rand.NewPCG(seed, seed)), start: start, end: from.Add(month),
		content: make(map[digest.Digest][]byte), tags: make(map[audit.Ref][]meaning),
	}
	bases := map[string][]time.Time{"debian:13": h.moving("debian:13", 1.5), "ubuntu:24.04": h.moving("ubuntu:24.04", 1.1), "alpine:3.22": h.moving("alpine:3.22", .25)}
	names := slices.Sorted(maps.Keys(bases))
	for n := 0; len(h.tags) < refs; n++ {
		switch n % 10 {
		case 0, 1, 2, 3, 4:
			base := names[h.rnd.IntN(len(names))]
			h.official(fmt.Sprintf("app%d", n), base, bases[base])
		case 5, 6, 7:
			h.vendor(fmt.Sprintf("ghcr.io/vendor%d/app", n), .5+h.rnd.Float64()*2)
		case 8:
			h.nightly(fmt.Sprintf("quay.io/nightly/app%d", n))
		case 9:
			h.old(fmt.Sprintf("quay.io/old/app%d", n))
		}
	}
	h.everyday(refs, from)
	// Five tags overwritten and two new ones, as of checkmarx/kics on 2026-04-22; and all
	// versions made one, as of tj-actions/changed-files on 2025-03-14 (AUDIT.md, A2).
	h.attack("docker.io/checkmarx/kics", from.Add(20*day+h.within(day)),
		map[string]string{"latest": "20", "v2.1.20": "20", "v2.1.20-debian": "20d", "alpine": "20", "debian": "20d"},
		map[string]string{"latest": "evil", "v2.1.20": "evil", "v2.1.20-debian": "evil-d", "alpine": "evil", "debian": "evil-d", "v2.1.21": "evil", "v2.1.21-debian": "evil-d"})
	all, one := make(map[string]string), make(map[string]string)
	for i := range 12 {
		tag := fmt.Sprintf("v4.%d.0", i)
		all[tag], one[tag] = tag, "memdump"
	}
	h.attack("ghcr.io/tj-actions/changed-files", from.Add(9*day+h.within(day)), all, one)
	for ref, list := range h.tags {
		slices.SortStableFunc(list, func(a, b meaning) int { return a.at.Compare(b.at) })
		h.tags[ref] = list
	}
	return h
}

func (h *history) meansAt(ref audit.Ref, at time.Time) (d digest.Digest) {
	latest := time.Time{}
	for _, m := range h.tags[ref] {
		if !m.at.After(at) && !m.at.Before(latest) {
			d, latest = m.digest, m.at
		}
	}
	return d
}

// answer is what a registry says about a tag at a time, with what changed since old.
func (h *history) answer(ref audit.Ref, at time.Time, old digest.Digest) audit.Observation {
	d := h.meansAt(ref, at)
	if d == "" {
		return audit.Observation{Absent: fs.ErrNotExist, Gone: true}
	}
	o := audit.Observation{Digest: d, MediaType: ocispec.MediaTypeImageIndex, Size: int64(len(h.content[d]))}
	if old == "" || old == d {
		return o
	}
	changed, err := diff.Between(old, d, func(d digest.Digest) ([]byte, error) {
		if b, ok := h.content[d]; ok {
			return b, nil
		}
		return nil, fs.ErrNotExist
	})
	if err != nil {
		panic(err)
	}
	o.Change = &audit.Comparison{Old: old, New: d, Class: audit.Class(changed.Class), Signals: changed.Signals}
	o.Change.OldVersion, o.Change.NewVersion = changed.Says(ocispec.AnnotationVersion)
	if base, ok := h.base(changed, at); ok {
		o.Change.Base = base
	}
	return o
}

// base is the base image that a rebuild took over, if that moved before.
func (h *history) base(d *diff.Diff, at time.Time) (audit.Ref, bool) {
	_, name := d.Says(ocispec.AnnotationBaseImageName)
	repository, tag, _ := strings.Cut(name, ":")
	ref := audit.Ref{Upstream: "docker.io", Repository: "library/" + repository, Tag: tag}
	own := slices.ContainsFunc(d.Changed, func(p diff.PlatformDiff) bool { return p.Config == nil || !p.Config.BaseOnly })
	moved := 0
	for _, m := range h.tags[ref] {
		if !m.at.After(at) {
			moved++
		}
	}
	return ref, d.Class == diff.Rebuild && !own && moved > 1
}

// A reader is a person who is told.
type reader struct {
	mu  sync.Mutex
	got []heard
}

type heard struct {
	at time.Time
	notify.Message
}

func (r *reader) Send(_ context.Context, m notify.Message) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, heard{time.Now(), m})
	return nil
}

// A score is what somebody heard in a month.
type score struct {
	moves     int
	questions int
	immediate [5]int        // messages by week, that are about no incident
	digested  int           // events in daily digests
	late      time.Duration // from when the last of an incident's tags was asked about to the alarm, at most
	missed    []string
	examples  []string
}

func (s score) String() string {
	return fmt.Sprintf("%d moves, %d questions; immediate messages a week %v, %d events in digests; the last incident was told %v after it could be known; missed %v",
		s.moves, s.questions, s.immediate[:4], s.digested, s.late, s.missed)
}

// live has a server watch a history for a month, under a preset, after it had been there
// for some time, and returns what its reader heard.
func live(t *testing.T, preset string, refs int, before time.Duration) score {
	t.Helper()
	store, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "audit.db"), "tidemark.test/log")
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	policy, errs := audit.Compile(audit.PolicyText{Preset: preset})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	from := time.Now().Add(before)
	h := newHistory(*monthSeed, refs, time.Now(), from)
	replay(t, h, store, policy, from)
	time.Sleep(time.Until(from))

	r := &reader{}
	at, err := notify.ParseTimeOfDay("daily@08:00")
	if err != nil {
		t.Fatal(err)
	}
	var d *notify.Dispatcher
	ledger := audit.New(audit.Options{
		Store: store, Policy: policy, Log: zerolog.Nop(),
		Notify:   func(e audit.Event) []audit.Recipient { return d.Recipients(e) },
		Recorded: func(int64, audit.Event) { d.Grown() },
	})
	d = notify.New(notify.Options{
		Outbox: store, Origin: "tidemark.test/log", Undelivered: ledger.Undelivered, Log: zerolog.Nop(),
		Routes: []notify.Route{{Name: "people", Sink: r, MinSeverity: audit.Warning, Digest: &at, ByRepository: true, Wait: 2 * time.Minute, FlapWindow: 15 * time.Minute}},
	})
	var mu sync.Mutex
	questions := 0
	asked := make(map[audit.Ref]time.Time) // first after its incident
	o := watch.Options{
		Pace: pace, Source: store, Log: zerolog.Nop(),
		Ask: func(ctx context.Context, ref audit.Ref, every time.Duration) (audit.Answer, error) {
			mu.Lock()
			questions++
			for _, in := range h.incidents {
				if _, again := asked[ref]; in.repository == ref.Upstream+"/"+ref.Repository && time.Now().After(in.at.Add(time.Minute)) && !again {
					asked[ref] = time.Now()
				}
			}
			mu.Unlock()
			a, err := ledger.Watch(ctx, ref, every, func(_ context.Context, q audit.Question) (audit.Observation, error) {
				o := h.answer(ref, time.Now(), q.Known.Head)
				if o.Absent != nil && !q.Known.Known() {
					return o, o.Absent
				}
				return o, nil
			})
			if errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
			return a, err
		},
		List: func(_ context.Context, upstream, repository string) (tags []string, _ error) {
			for ref := range h.tags {
				if ref.Upstream == upstream && ref.Repository == repository && h.meansAt(ref, time.Now()) != "" {
					tags = append(tags, ref.Tag)
				}
			}
			slices.Sort(tags)
			return tags, nil
		},
	}
	repositories := make(map[string]bool)
	for ref := range h.tags {
		repositories[ref.Upstream+"/"+ref.Repository] = true
	}
	for _, name := range slices.Sorted(maps.Keys(repositories)) {
		g, err := audit.ParseGlob(name + ":*")
		if err != nil {
			t.Fatal(err)
		}
		o.Patterns = append(o.Patterns, g)
	}
	ctx, cancel := context.WithTimeout(t.Context(), month)
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{watch.New(o).Run, d.Run} {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	cancel()
	s := judged(h, r.got, asked, from)
	s.questions = questions
	for _, list := range h.tags {
		for _, m := range list[1:] {
			if m.at.After(from) {
				s.moves++
			}
		}
	}
	return s
}

// replay records what happened before the month, at its time.
func replay(t *testing.T, h *history, store *sqlite.Store, policy *audit.Policy, until time.Time) {
	t.Helper()
	type change struct {
		ref audit.Ref
		at  time.Time
	}
	var all []change
	for ref, list := range h.tags {
		for _, m := range list {
			if m.at.Before(until) {
				all = append(all, change{ref, m.at})
			}
		}
	}
	slices.SortFunc(all, func(a, b change) int {
		return cmp.Or(a.at.Compare(b.at), strings.Compare(a.ref.String(), b.ref.String()))
	})
	for _, c := range all {
		_, err := store.Advance(t.Context(), c.ref, func(r audit.Record) (audit.State, []audit.Event, error) {
			st, events := policy.Next(c.ref, r, h.answer(c.ref, c.at, r.State.Head), c.at)
			audit.Identify(&st, events)
			return st, events, nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// judged scores what was heard.
func judged(h *history, got []heard, asked map[audit.Ref]time.Time, from time.Time) (s score) {
	about := func(m heard, in incident) bool {
		ref := m.Items[0].Event.Ref
		return in.repository == ref.Upstream+"/"+ref.Repository
	}
	for _, in := range h.incidents {
		i := slices.IndexFunc(got, func(m heard) bool {
			return !m.Digest && about(m, in) && m.Severity() == audit.Critical && m.at.After(in.at)
		})
		if i < 0 {
			s.missed = append(s.missed, in.repository)
			continue
		}
		last := time.Time{}
		for ref, at := range asked {
			if in.repository == ref.Upstream+"/"+ref.Repository && slices.Contains(in.tags, ref.Tag) && at.After(last) {
				last = at
			}
		}
		s.late = max(s.late, got[i].at.Sub(last))
	}
	for _, m := range got {
		switch {
		case m.Digest:
			s.digested += len(m.Items)
		case !slices.ContainsFunc(h.incidents, func(in incident) bool { return about(m, in) && m.at.After(in.at) }):
			s.immediate[int(m.at.Sub(from)/(7*day))]++
			s.examples = append(s.examples, m.at.Format(time.DateTime)+" "+m.Title()+" "+fmt.Sprint(m.Items[0].Event.Signals))
		}
	}
	return s
}

// A month of everyday life with two incidents in it: these are told as critical before
// any of their tags is asked about a second time, and nothing else, or little, is told
// at once. The tags that are attacked must have stood for 30 days by then. With more tags:
// go test ./proxy/watch -run Month -month.refs 1000 -v
func TestAMonthIsQuietButForIncidents(t *testing.T) {
	for _, preset := range []string{"homelab", "balanced"} {
		for name, before := range map[string]time.Duration{"after 60 days": 60 * day, "after 40 days": 40 * day} {
			t.Run(preset+" "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := live(t, preset, *monthRefs, before)
					t.Log(s)
					if len(s.missed) > 0 || s.late > 2*time.Minute {
						t.Error("an incident was not told in time")
					}
					for week, n := range s.immediate {
						if n >= 10 {
							t.Errorf("week %d: %d messages at once", week+1, n)
						}
					}
					if s.digested == 0 {
						t.Error("nothing was in a digest")
					}
					for _, e := range s.examples {
						t.Log(e)
					}
				})
			})
		}
	}
}
