package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"tidemark/audit"
	"tidemark/audit/bundle"
	"tidemark/cache"
	"tidemark/proxy"
	"tidemark/proxy/admin"
	"tidemark/proxy/carry"
	"tidemark/proxy/upstream"
)

// images shows the admin API what package proxy knows of images.
type images struct{ s *server }

// Image implements admin.Images.
func (i images) Image(ctx context.Context, d digest.Digest, platforms []string, verify bool) (admin.Image, error) {
	im, err := i.s.contents.Image(ctx, d, platforms, verify)
	return imageOf(im), err
}

func imageOf(im proxy.Image) admin.Image {
	out := admin.Image{Digest: im.Digest, Platforms: []admin.Platform{}}
	for _, p := range im.Platforms {
		out.Platforms = append(out.Platforms, admin.Platform{Platform: p.Platform, Complete: p.Complete, Bytes: p.Bytes, Missing: missingOf(p.Missing)})
	}
	return out
}

func missingOf(list []cache.Reference) []admin.Missing {
	out := []admin.Missing{}
	for _, m := range list {
		out = append(out, admin.Missing(m))
	}
	return out
}

// meant is the digest that a target means now.
func (i images) meant(ctx context.Context, t admin.Target) (digest.Digest, error) {
	if t.Digest != "" {
		return t.Digest, nil
	}
	st, err := i.s.store.State(ctx, t.Ref)
	if err != nil {
		return "", err
	}
	served := i.s.ledger.Tag(t.Ref, st).Serves()
	if served == "" {
		return "", &audit.NeverSeenError{Ref: t.Ref}
	}
	return served, nil
}

// Pin implements admin.Images.
func (i images) Pin(ctx context.Context, t admin.Target) (admin.Touched, error) {
	d, err := i.meant(ctx, t)
	if err != nil {
		return admin.Touched{}, err
	}
	if t.Digest != "" {
		if _, here := i.s.cache.Holds(d); !here {
			return admin.Touched{}, fmt.Errorf("%s is not here: pull it, or tidemark warm the image that needs it, and pin it then", d)
		}
	}
	if im, err := i.s.contents.Image(ctx, d, t.Platforms, false); err != nil {
		return admin.Touched{}, err
	} else if t.Platforms != nil && len(im.Platforms) == 0 {
		return admin.Touched{}, &admin.Error{Status: http.StatusConflict, Code: "no_platform", Message: fmt.Sprintf("%s has no image for %s", t.Target, strings.Join(t.Platforms, ", "))}
	}
	out, err := i.extent(ctx, d, t.Platforms)
	if err != nil {
		return admin.Touched{}, err
	}
	if err := i.s.cache.FitsPinned(out.Digests, missingBytes(out.Missing)); err != nil {
		return admin.Touched{}, &admin.Error{Status: http.StatusConflict, Code: "too_large", Message: err.Error()}
	}
	pin := audit.Pin{Target: t.Target, Ref: t.Ref, Digest: t.Digest, Platforms: t.Platforms, Reason: t.Reason}
	if err := i.s.ledger.Pin(ctx, i.s.store, pin); err != nil {
		return admin.Touched{}, err
	}
	for _, d := range out.Digests {
		i.s.cache.Keep(d, true)
	}
	return out, nil
}

func missingBytes(list []admin.Missing) (n int64) {
	for _, m := range list {
		n += max(0, m.Size)
	}
	return n
}

// extent is what an image consists of, here and not.
func (i images) extent(ctx context.Context, d digest.Digest, platforms []string) (admin.Touched, error) {
	content, missing, err := i.s.contents.Extent(ctx, d, platforms)
	if err != nil {
		return admin.Touched{}, err
	}
	out := admin.Touched{Missing: missingOf(missing)}
	for _, c := range content {
		out.Digests, out.Bytes = append(out.Digests, c.Digest), out.Bytes+c.Size
	}
	return out, nil
}

// Unpin implements admin.Images.
func (i images) Unpin(ctx context.Context, t admin.Target) (admin.Touched, error) {
	if t.Platforms != nil {
		return admin.Touched{}, &admin.Error{Status: http.StatusBadRequest, Code: "bad_request", Message: "platforms: a pin is taken back whole; pin it again for the platforms that are wanted"}
	}
	if err := i.s.ledger.Unpin(ctx, i.s.store, audit.Pin{Target: t.Target, Ref: t.Ref, Digest: t.Digest}); err != nil {
		return admin.Touched{}, err
	}
	i.s.cache.LookAtPins(ctx)
	d, err := i.meant(ctx, t)
	if err != nil {
		return admin.Touched{}, nil // it means nothing any more
	}
	return i.extent(ctx, d, nil)
}

// Remove implements admin.Images.
func (i images) Remove(ctx context.Context, t admin.Target) (admin.Touched, error) {
	d, err := i.meant(ctx, t)
	if err != nil {
		return admin.Touched{}, err
	}
	i.s.cache.LookAtPins(ctx) // what is pinned no longer may go
	taken, err := i.s.contents.Remove(ctx, d, t.Platforms, i.s.store.EachTag(ctx, audit.TagQuery{}))
	if errors.Is(err, cache.ErrPinned) {
		err = &admin.Error{Status: http.StatusConflict, Code: "pinned", Message: fmt.Sprintf("%s is pinned: tidemark cache ls --pins says why; tidemark cache unpin takes back what an operator or a bundle pinned", d)}
	}
	out := admin.Touched{Digests: taken.Digests, Bytes: taken.Bytes, Kept: taken.Kept}
	if len(taken.Digests) == 0 {
		return out, err
	}
	op := audit.Operator{Action: "purge", Reason: t.Reason, Digest: d, Target: strings.Join(t.Platforms, ",")}
	if t.Ref != (audit.Ref{}) {
		op.Target = strings.TrimSpace(t.Ref.String() + " " + op.Target)
	}
	return out, errors.Join(err, i.s.ledger.Act(ctx, op))
}

// Scrub implements admin.Images.
func (i images) Scrub(ctx context.Context, rate int64, tell func(admin.ScrubProgress)) (admin.ScrubReport, error) {
	report, findings, err := i.s.scrubber.Scrub(ctx, rate, func(r cache.ScrubReport) {
		tell(admin.ScrubProgress{Checked: r.Checked, Bytes: r.Bytes, Total: i.s.cache.Stats().Bytes})
	})
	out := admin.ScrubReport{Checked: report.Checked, Bytes: report.Bytes}
	for _, f := range findings {
		w := admin.Wrong{Digest: f.Digest, Action: f.Action}
		if f.Err != nil {
			w.Error = f.Err.Error()
		}
		out.Wrong = append(out.Wrong, w)
	}
	if errors.Is(err, proxy.ErrScrubbing) {
		err = &admin.Error{Status: http.StatusConflict, Code: "busy", Message: err.Error()}
	}
	return out, err
}

// carrier shows the admin API what carries images.
type carrier struct{ s *server }

// warmImages bounds the images that are fetched at a time.
const warmImages = 3

// Warm implements admin.Carrier.
func (c carrier) Warm(ctx context.Context, q admin.WarmRequest, tell func(admin.WarmProgress)) (admin.WarmReport, error) {
	wants := make([]proxy.Want, len(q.Refs))
	for i, text := range q.Refs {
		w, err := parseWant(text)
		if err != nil {
			return admin.WarmReport{}, &admin.Error{Status: http.StatusBadRequest, Code: "bad_request", Message: "refs: " + err.Error()}
		}
		wants[i] = w
	}
	report := admin.WarmReport{Complete: true}
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(warmImages)
	for i, w := range wants {
		g.Go(func() error {
			end := c.warm(ctx, w, q.Platforms, func(p admin.WarmProgress) { p.Ref = q.Refs[i]; tell(p) })
			end.Ref = q.Refs[i]
			mu.Lock()
			defer mu.Unlock()
			if report.Filled, report.Bytes = report.Filled+end.Filled, report.Bytes+end.Bytes; end.Error != "" {
				report.Complete = false
				report.Failed = append(report.Failed, admin.Failed{Ref: end.Ref, Error: end.Error})
			}
			tell(end)
			return nil
		})
	}
	_ = g.Wait() // what failed is in the report
	slices.SortFunc(report.Failed, func(a, b admin.Failed) int { return strings.Compare(a.Ref, b.Ref) })
	return report, nil
}

// warm has one image here.
func (c carrier) warm(ctx context.Context, w proxy.Want, platforms []string, tell func(admin.WarmProgress)) admin.WarmProgress {
	var last admin.WarmProgress
	warmed, err := c.s.contents.Warm(ctx, c.s.ledger, w, platforms, func(d digest.Digest, have, total int64) {
		last = admin.WarmProgress{Digest: d, Have: have, Total: total}
		tell(last)
	})
	last.Done, last.Filled, last.Bytes, last.Platforms = true, warmed.Filled, warmed.Bytes, imageOf(warmed.Image).Platforms
	if warmed.Image.Digest != "" {
		last.Digest = warmed.Image.Digest
	}
	switch {
	case err != nil:
		last.Error = err.Error()
	case len(warmed.Image.Platforms) == 0:
		last.Error = "it has no image for " + strings.Join(platforms, ", ")
	case !warmed.Image.Complete():
		last.Error = "it is not complete: there was no room for all of it, or it was evicted at once; cache.max_bytes bounds what is kept"
	}
	return last
}

// parseWant reads a reference with a tag, a digest or both, of which the digest counts.
func parseWant(text string) (proxy.Want, error) {
	named, err := reference.ParseNamed(text)
	if err != nil {
		return proxy.Want{}, fmt.Errorf("%.300q is not a whole reference such as docker.io/library/nginx:1.27: %w", text, err)
	}
	w := proxy.Want{Ref: audit.Ref{Upstream: reference.Domain(named), Repository: reference.Path(named)}}
	if digested, ok := named.(reference.Digested); ok {
		w.Digest = digested.Digest()
		return w, nil
	}
	tagged, ok := named.(reference.Tagged)
	if !ok {
		return w, fmt.Errorf("%.300q has neither a tag nor a digest", text)
	}
	w.Ref.Tag = tagged.Tag()
	return w, nil
}

// Export implements admin.Carrier.
func (c carrier) Export(ctx context.Context, w io.Writer, q admin.ExportRequest) error {
	request := carry.Request{Refs: q.Parsed, Platforms: q.Platforms}
	if s := q.Since; s != nil {
		request.Since = &carry.Since{Bundle: s.Bundle, LogSize: s.LogSize, Refs: s.Parsed, Content: s.Content}
	}
	_, err := c.s.carrier.Export(ctx, w, request)
	return carryError(err)
}

// Import implements admin.Carrier.
func (c carrier) Import(ctx context.Context, r io.Reader, trust string) (admin.ImportReport, error) {
	in, err := c.s.carrier.Import(ctx, r, trust)
	if err != nil {
		return admin.ImportReport{}, carryError(err)
	}
	out := admin.ImportReport{Bundle: in.Bundle, Origin: in.Origin, LogSize: in.LogSize, Already: in.Already}
	for _, r := range in.Refs {
		out.Refs = append(out.Refs, admin.ImportedRef(r))
	}
	return out, nil
}

// carryError is an error of a bundle as the API answers it.
func carryError(err error) error {
	var wrong *bundle.WrongError
	var untrusted *carry.UntrustedError
	var unfit *carry.UnfitError
	switch {
	case errors.As(err, &wrong):
		return &admin.Error{Status: http.StatusUnprocessableEntity, Code: "wrong_bundle", Message: err.Error()}
	case errors.As(err, &untrusted):
		return &admin.Error{Status: http.StatusForbidden, Code: "untrusted", Message: err.Error()}
	case errors.As(err, &unfit):
		return &admin.Error{Status: http.StatusConflict, Code: "unfit", Message: err.Error()}
	case errors.Is(err, cache.ErrNoRoom):
		return &admin.Error{Status: http.StatusInsufficientStorage, Code: "no_room", Message: err.Error()}
	case errors.Is(err, audit.ErrNoKey):
		return &admin.Error{Status: http.StatusConflict, Code: "unsigned", Message: err.Error()}
	}
	return err
}

// kept is what the ledger wants kept.
func (s *server) kept(ctx context.Context) iter.Seq2[audit.Kept, error] {
	keep := s.cfg.Audit.Keep
	return s.store.Keep(ctx, keep.Digests, time.Now().Add(-time.Duration(keep.Days)*24*time.Hour))
}

// backfill asks upstream what a ref meant in the past, and has that recorded as its
// word.
func (s *server) backfill(upstreams map[string]*upstream.Upstream) func(context.Context, audit.Ref) (admin.BackfillReport, error) {
	return func(ctx context.Context, ref audit.Ref) (admin.BackfillReport, error) {
		up := upstreams[ref.Upstream]
		if up == nil {
			return admin.BackfillReport{}, &admin.Error{Status: http.StatusNotFound, Code: "not_found", Message: ref.Upstream + " is not a configured upstream"}
		}
		kind := s.cfg.Upstreams[ref.Upstream].History
		told, source, err := up.TagHistory(ctx, ref.Repository, ref.Tag, kind)
		if errors.Is(err, errors.ErrUnsupported) {
			err = &admin.Error{Status: http.StatusNotFound, Code: "not_offered", Message: fmt.Sprintf("%s does not tell what %s meant in the way that upstreams.%s.history says (%s): %v", ref.Upstream, ref, ref.Upstream, kind, err)}
		}
		if err != nil {
			return admin.BackfillReport{}, err
		}
		claims := make([]audit.Claim, 0, len(told))
		for _, a := range told {
			claims = append(claims, claimOf(a, source))
		}
		added, err := s.ledger.Backfill(ctx, s.store, ref, source, claims)
		if err != nil {
			return admin.BackfillReport{}, err
		}
		out := admin.BackfillReport{Ref: ref.String(), Source: source, Added: added}
		for _, c := range claims {
			out.History = append(out.History, admin.Claim{Digest: c.Digest, FirstSeen: c.Since, Ended: c.Until})
		}
		return out, nil
	}
}

// claimOf is upstream's word as the ledger keeps it. What still lasts is confirmed now.
func claimOf(a upstream.Asserted, source string) audit.Claim {
	c := audit.Claim{Basis: audit.Asserted, Source: source, Digest: a.Digest, MediaType: a.MediaType, Size: a.Size, Since: a.From, LastConfirmed: time.Now().UTC().Truncate(time.Millisecond)}
	if !a.Until.IsZero() {
		c.Until, c.LastConfirmed = &a.Until, a.Until
	}
	return c
}
