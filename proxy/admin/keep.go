package admin

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// Store is the answer of GET /api/v1/cache, in bytes.
type Store struct {
	Bytes       int64 `json:"bytes"`
	Blobs       int64 `json:"blobs"`
	Budget      int64 `json:"budget"`
	PinnedBytes int64 `json:"pinned_bytes"` // that are never evicted
}

func (h *Handler) store(*http.Request) (any, error) {
	s := h.o.Cache.Stats()
	return Store{Bytes: s.Bytes, Blobs: s.Blobs, Budget: s.Budget, PinnedBytes: s.PinnedBytes}, nil
}

// Images looks at what images are made of, and keeps or removes it.
type Images interface {
	// Image tells how much of the image of a digest is here, of some platforms or, with
	// nil, of all. With verify what is here is read and compared with its digest.
	Image(ctx context.Context, d digest.Digest, platforms []string, verify bool) (Image, error)

	// Pin, Unpin and Remove keep an image, no longer keep it, or take it out.
	Pin(context.Context, Target) (Touched, error)
	Unpin(context.Context, Target) (Touched, error)
	Remove(context.Context, Target) (Touched, error)

	// Scrub compares everything that is here with its digest, at a rate in bytes a
	// second or, with 0, the configured one.
	Scrub(ctx context.Context, rate int64, tell func(ScrubProgress)) (ScrubReport, error)
}

// ImageList is the answer of GET /api/v1/cache/images.
type ImageList struct {
	Images []Image `json:"images"`
	Next   string  `json:"next,omitempty"`
}

// Image is what a ref means, and how much of it is here.
type Image struct {
	Ref       string        `json:"ref,omitempty"`
	Digest    digest.Digest `json:"digest"` // "" when nothing is served
	Platforms []Platform    `json:"platforms"`
}

// Platform is the image of one platform.
type Platform struct {
	Platform string    `json:"platform"` // "" when nothing that is here tells
	Complete bool      `json:"complete"`
	Bytes    int64     `json:"bytes"` // that are here
	Missing  []Missing `json:"missing"`
}

// Missing is content that is not here. Size is -1 when it is not known.
type Missing struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

// Complete tells whether there is an image, and every platform of it is complete.
func (i Image) Complete() bool {
	for _, p := range i.Platforms {
		if !p.Complete {
			return false
		}
	}
	return len(i.Platforms) > 0
}

// images lists how much of what known refs mean is here.
func (h *Handler) images(r *http.Request) (any, error) {
	q := r.URL.Query()
	n, err := limit(q)
	if err != nil {
		return nil, err
	}
	complete, err := truth(q, "complete")
	if err != nil {
		return nil, err
	}
	verify, err := truth(q, "verify")
	if err != nil {
		return nil, err
	}
	var query audit.TagQuery
	if m := q.Get("match"); m != "" {
		if query.Match, err = audit.ParseGlob(m); err != nil {
			return nil, badRequest("match: %v", err)
		}
	}
	if a := q.Get("after"); a != "" {
		if query.After, err = audit.ParseRef(a); err != nil {
			return nil, badRequest("after: %v", err)
		}
	}
	platforms := q["platform"]
	if err := h.o.CheckPlatforms(platforms); err != nil {
		return nil, badRequest("platform: %v", err)
	}
	list := ImageList{Images: []Image{}}
	for t, err := range h.o.EachTag(r.Context(), query) {
		if err != nil {
			return nil, err
		}
		if len(list.Images) == n {
			list.Next = list.Images[n-1].Ref
			break
		}
		im := Image{Digest: h.o.Ledger.Tag(t.Ref, t.State).Serves(), Platforms: []Platform{}}
		if im.Digest != "" {
			if im, err = h.o.Images.Image(r.Context(), im.Digest, platforms, verify != nil && *verify); err != nil {
				return nil, err
			}
		}
		if im.Ref = t.Ref.String(); complete == nil || *complete == im.Complete() {
			list.Images = append(list.Images, im)
		}
	}
	return list, nil
}

// truth reads a parameter that is true or false, nil if it is not there.
func truth(q url.Values, key string) (*bool, error) {
	s := q.Get(key)
	if s == "" {
		return nil, nil
	}
	is, err := strconv.ParseBool(s)
	if err != nil {
		return nil, badRequest("%s %.20q is neither true nor false", key, s)
	}
	return &is, nil
}

// Target is the body of POST /api/v1/cache/{pin,unpin,remove}: a ref or a digest.
type Target struct {
	Target    string   `json:"target"`
	Platforms []string `json:"platforms"` // of an index; none for all
	Reason    string   `json:"reason"`

	Ref    audit.Ref     `json:"-"` // one of the two is set
	Digest digest.Digest `json:"-"`
}

// Touched is what such a call was about.
type Touched struct {
	Digests []digest.Digest `json:"digests"` // that are here, or were
	Bytes   int64           `json:"bytes"`
	Missing []Missing       `json:"missing"` // what is to be kept and is not here; remove: nothing
	Kept    []digest.Digest `json:"kept"`    // remove: what others need, or is pinned
}

// touch makes a call of one about a target.
func (h *Handler) touch(f func(context.Context, Target) (Touched, error)) http.HandlerFunc {
	return change(func(r *http.Request) (any, error) {
		var t Target
		if err := body(r, &t); err != nil {
			return nil, err
		}
		var err error
		if strings.HasPrefix(t.Target, "sha256:") || strings.HasPrefix(t.Target, "sha512:") {
			t.Digest, err = parseDigest("target", t.Target)
		} else if t.Ref, err = audit.ParseRef(t.Target); err != nil {
			err = badRequest("target is neither a digest nor a ref: %v", err)
		}
		if err != nil {
			return nil, err
		}
		if err := h.platforms(&t.Platforms); err != nil {
			return nil, err
		}
		out, err := f(r.Context(), t)
		out.Digests, out.Missing, out.Kept = nonNil(out.Digests), nonNil(out.Missing), nonNil(out.Kept)
		return out, err
	})
}

// PinList is the answer of GET /api/v1/cache/pins.
type PinList struct {
	Pins []Pin  `json:"pins"`
	Next string `json:"next,omitempty"`
}

// Pin is content that is kept, with what it refers to.
type Pin struct {
	Digest    digest.Digest `json:"digest"`
	Reason    string        `json:"reason"`              // pin, hold, bundle or history
	For       string        `json:"for,omitempty"`       // the ref or the pin that it is kept for
	Note      string        `json:"note,omitempty"`      // of a pin, what the operator says why
	Firm      bool          `json:"firm"`                // never evicted, not only while there is room
	Platforms []string      `json:"platforms,omitempty"` // of an index; none for all
	Here      bool          `json:"here"`
}

// pins lists what is kept, and why.
func (h *Handler) pins(r *http.Request) (any, error) {
	q := r.URL.Query()
	n, err := limit(q)
	if err != nil {
		return nil, err
	}
	after := 0
	if s := q.Get("after"); s != "" {
		if after, err = strconv.Atoi(s); err != nil || after < 0 {
			return nil, badRequest("after %.50q is not a place in this list", s)
		}
	}
	list, place := PinList{Pins: []Pin{}}, 0
	for k, err := range h.o.Kept(r.Context()) {
		switch {
		case err != nil:
			return nil, err
		case q.Get("reason") != "" && q.Get("reason") != k.Reason:
			continue
		}
		if place++; place <= after {
			continue
		}
		if len(list.Pins) == n {
			list.Next = strconv.Itoa(after + n)
			break
		}
		_, here := h.o.Cache.Holds(k.Digest)
		list.Pins = append(list.Pins, Pin{Digest: k.Digest, Reason: k.Reason, For: k.For, Note: k.Note, Firm: k.Firm, Platforms: k.Platforms, Here: here})
	}
	return list, nil
}

// ScrubProgress is a line of POST /api/v1/cache/scrub.
type ScrubProgress struct {
	Checked int64 `json:"checked"` // pieces of content so far
	Bytes   int64 `json:"bytes"`
	Total   int64 `json:"total"` // bytes that are here
}

// ScrubReport is the last one.
type ScrubReport struct {
	Done    bool    `json:"done"`
	Checked int64   `json:"checked"`
	Bytes   int64   `json:"bytes"`
	Wrong   []Wrong `json:"wrong"`
}

// Wrong is content that was not what its digest says.
type Wrong struct {
	Digest digest.Digest `json:"digest"`
	Action string        `json:"action"` // removed, refilled, or unreadable: it is still there
	Error  string        `json:"error,omitempty"`
}

func (h *Handler) scrub(r *http.Request, tell func(any)) (any, error) {
	var in struct {
		Rate int64 `json:"rate"` // bytes a second, 0 for the configured one
	}
	if err := body(r, &in); err != nil {
		return nil, err
	}
	if in.Rate < 0 {
		return nil, badRequest("rate: %d bytes a second is not possible", in.Rate)
	}
	report, err := h.o.Images.Scrub(r.Context(), in.Rate, func(p ScrubProgress) { tell(p) })
	if err != nil {
		return nil, fmt.Errorf("scrub: %w", err)
	}
	report.Done, report.Wrong = true, nonNil(report.Wrong)
	return report, nil
}
