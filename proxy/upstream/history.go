package upstream

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/proxy/oci"
)

// An Asserted is a time in which a tag meant a digest, by upstream's own word.
type Asserted struct {
	Digest    digest.Digest
	MediaType string // "" when it is not told
	Size      int64  // of the manifest in bytes, 0 when it is not told
	From      time.Time
	Until     time.Time // zero while it lasts
}

// Where upstreams tell of the past of their tags.
const (
	HistoryOCI        = "oci"        // distribution-spec#606, and another tidemark
	HistoryQuay       = "quay"       // GET /api/v1/repository/<name>/tag/
	HistoryChainguard = "chainguard" // GET /v2/<name>/_chainguard/history/<tag>
)

// Bounds of what upstream tells of one tag.
const (
	historyPages   = 50
	historyPage    = 100
	historyMost    = 5000 // stretches
	maxHistoryPage = 4 << 20
	chainguardPage = 1000 // what Chainguard answers with at most
)

// TagHistory returns what a tag meant in the past, oldest first, as upstream tells it
// in the way of a kind, and the name of the list. An upstream that offers none is
// errors.ErrUnsupported; another tidemark that offers it, and never saw the tag, is not.
//
// Quay's API is no part of its registry and takes other credentials: it is asked without
// any, and tells of public repositories.
func (u *Upstream) TagHistory(ctx context.Context, repository, tag, kind string) (told []Asserted, source string, err error) {
	switch kind {
	case HistoryQuay:
		source = "quay"
		told, err = u.quayHistory(ctx, repository, tag)
	case HistoryChainguard:
		source = "_chainguard/history"
		told, err = u.chainguardHistory(ctx, repository, tag)
	case HistoryOCI:
		for _, source = range []string{"_oci/tag-history", "_tidemark/tag-history"} {
			if told, err = u.ociHistory(ctx, repository, tag, source); !isUnoffered(err) {
				break
			}
		}
	default:
		return nil, "", fmt.Errorf("a tag history of kind %q: %w", kind, errors.ErrUnsupported)
	}
	if isUnoffered(err) {
		err = fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	if err != nil {
		return nil, "", err
	}
	if err := plausible(told, time.Now()); err != nil {
		return nil, "", &Error{Upstream: u.name, Op: "history of " + repository + ":" + tag, Nonsense: true, Caller: u.caller, Err: err}
	}
	return told, source, nil
}

// isUnoffered tells the answers of a registry that knows no such list.
func isUnoffered(err error) bool {
	var e *Error
	switch {
	case !errors.As(err, &e):
		return false
	case strings.Contains(e.Op, "/_tidemark/") && strings.HasPrefix(e.Message, oci.ManifestUnknown):
		return false // it is another tidemark, which never saw the tag
	}
	return slices.Contains([]int{http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented}, e.Status) ||
		strings.HasPrefix(e.Message, oci.Unsupported)
}

// plausible refuses what cannot be a history. It sorts what is told, oldest first as far
// as its teller knows: of what was meant at the same time the order stays.
func plausible(told []Asserted, now time.Time) error {
	slices.SortStableFunc(told, func(a, b Asserted) int { return a.From.Compare(b.From) })
	for i, a := range told {
		switch {
		case a.From.Before(time.Unix(0, 0)) || a.From.After(now.Add(time.Hour)):
			return fmt.Errorf("it says that %s was meant from %s on", a.Digest, a.From.Format(time.RFC3339))
		case !a.Until.IsZero() && (a.Until.Before(a.From) || a.Until.After(now.Add(time.Hour))):
			return fmt.Errorf("it says that %s was meant from %s until %s", a.Digest, a.From.Format(time.RFC3339), a.Until.Format(time.RFC3339))
		case i > 0 && (told[i-1].Until.IsZero() || told[i-1].Until.After(a.From)):
			return fmt.Errorf("it says that both %s and %s were meant at %s", told[i-1].Digest, a.Digest, a.From.Format(time.RFC3339))
		}
	}
	return nil
}

// historyJSON reads one page of a history.
func (u *Upstream) historyJSON(ctx context.Context, path string, header http.Header, v any) (next *url.URL, err error) {
	resp, err := u.do(ctx, http.MethodGet, path, header)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := u.readAll(resp, path, maxHistoryPage)
	if err != nil {
		return nil, err
	}
	t, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil || t != "application/json" && !strings.HasSuffix(t, "+json") {
		// A page for people, or something else that is no list.
		return nil, &Error{Upstream: u.name, Op: "GET " + path, Status: http.StatusNotFound, Message: "no history of tags", Caller: u.caller}
	}
	if err := json.Unmarshal(body, v); err != nil {
		return nil, u.nonsense(resp.Request, fmt.Errorf("tag history: %w", err))
	}
	if link, ok := nextLink(resp.Header.Get("Link")); ok {
		next = resp.Request.URL.ResolveReference(link)
		if next.Host != resp.Request.URL.Host || next.Path != resp.Request.URL.Path {
			return nil, u.nonsense(resp.Request, fmt.Errorf("the history goes on elsewhere, at %.200q", link.Host+link.Path))
		}
	}
	return next, nil
}

func (u *Upstream) tooLong(path string) error {
	return &Error{Upstream: u.name, Op: "GET " + path, Nonsense: true, Caller: u.caller, Err: errors.New("the history is too long")}
}

// ociHistory reads the index that distribution-spec#606 proposes, newest first, with
// the annotations that another tidemark adds.
func (u *Upstream) ociHistory(ctx context.Context, repository, tag, list string) ([]Asserted, error) {
	base := "/v2/" + repository + "/" + list + "/" + tag
	var told []ocispec.Descriptor
	seen := make(map[string]bool)
	for path := base; len(seen) < historyPages; {
		var page ocispec.Index
		next, err := u.historyJSON(ctx, path, http.Header{"Accept": {ocispec.MediaTypeImageIndex}}, &page)
		if err != nil {
			return nil, err
		}
		if told = append(told, page.Manifests...); len(told) > historyMost {
			break
		}
		if next == nil {
			slices.Reverse(told)
			out, err := ociStretches(told)
			if err != nil {
				return nil, &Error{Upstream: u.name, Op: "GET " + base, Nonsense: true, Caller: u.caller, Err: fmt.Errorf("tag history: %w", err)}
			}
			return out, nil
		}
		seen[path] = true
		if path = base + "?" + next.Query().Encode(); seen[path] {
			return nil, &Error{Upstream: u.name, Op: "GET " + path, Nonsense: true, Caller: u.caller, Err: errors.New("the history goes round in circles")}
		}
	}
	return nil, u.tooLong(base)
}

// ociStretches makes stretches of entries, oldest first. One says that the tag came to
// mean a manifest, or that it was deleted from it.
func ociStretches(entries []ocispec.Descriptor) (out []Asserted, err error) {
	var before time.Time
	for _, d := range entries {
		if _, err := oci.ParseDigest(d.Digest.String()); err != nil {
			return nil, err
		}
		at, until, deleted, err := ociEvent(d.Annotations)
		if err != nil {
			return nil, err
		}
		if at.Before(before) {
			return nil, fmt.Errorf("it is not newest first: %s comes after %s", before.Format(time.RFC3339), at.Format(time.RFC3339))
		}
		before = at
		var last *Asserted // which still lasts, if it does
		if n := len(out); n > 0 && out[n-1].Until.IsZero() {
			last = &out[n-1]
		}
		switch {
		case deleted && last == nil && len(out) == 0:
			continue // what was before is not told any more
		case deleted && (last == nil || last.Digest != d.Digest):
			return nil, fmt.Errorf("it says that %s was deleted at %s, which the tag did not mean", d.Digest, at.Format(time.RFC3339))
		case last != nil:
			last.Until = at
		}
		if !deleted {
			out = append(out, Asserted{Digest: d.Digest, MediaType: d.MediaType, Size: d.Size, From: at, Until: until})
		}
	}
	return out, nil
}

// ociEvent reads when what an entry says came to be, and, if the entry says it, until
// when it was. Earlier drafts of the proposal have the first annotations, later ones
// the second; another tidemark tells of beginning and end in one entry.
func ociEvent(a map[string]string) (at, until time.Time, deleted bool, err error) {
	const created, gone, ended = "org.opencontainers.tag.created", "org.opencontainers.tag.deleted", "dev.tidemark.tag.ended"
	const when, what = "org.opencontainers.distribution.tag.timestamp", "org.opencontainers.distribution.tag.event"
	switch {
	case a[what] == "created", a[what] == "deleted":
		at, err = stamp(a[when])
		return at, until, a[what] == "deleted", err
	case a[what] != "":
		return at, until, false, fmt.Errorf("%.50q is neither created nor deleted", a[what])
	case a[created] == "" && a[gone] != "":
		at, err = stamp(a[gone])
		return at, until, true, err
	}
	at, err = stamp(a[created])
	if end := cmp.Or(a[gone], a[ended]); end != "" && err == nil {
		until, err = stamp(end)
	}
	return at, until, false, err
}

func stamp(s string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return t, fmt.Errorf("%.50q is no time", s)
	}
	return t.UTC().Truncate(time.Millisecond), nil
}

// quayAPI is where Quay's API has what it tells of repositories.
const quayAPI = "/api/v1/repository/"

// quayHistory reads Quay's list of what a tag meant (docs.quay.io, API, listRepoTags),
// newest first. A tag that is to expire has an end that is yet to come: it still lasts.
func (u *Upstream) quayHistory(ctx context.Context, repository, tag string) ([]Asserted, error) {
	base := quayAPI + repository + "/tag/"
	now := time.Now()
	var out []Asserted
	for n := 1; n <= historyPages; n++ {
		query := url.Values{"specificTag": {tag}, "limit": {strconv.Itoa(historyPage)}, "page": {strconv.Itoa(n)}, "onlyActiveTags": {"false"}}
		path := base + "?" + query.Encode()
		var page struct {
			Tags []struct {
				Name   string `json:"name"`
				Digest string `json:"manifest_digest"`
				Start  int64  `json:"start_ts"` // seconds
				End    int64  `json:"end_ts"`
			} `json:"tags"`
			More bool `json:"has_additional"`
		}
		if _, err := u.historyJSON(ctx, path, http.Header{"Accept": {"application/json"}}, &page); err != nil {
			return nil, err
		}
		for _, t := range page.Tags {
			dgst, err := oci.ParseDigest(t.Digest)
			if err != nil || t.Name != tag || t.Start <= 0 {
				return nil, &Error{Upstream: u.name, Op: "GET " + path, Nonsense: true, Caller: u.caller, Err: fmt.Errorf("tag history: %.100q meant %.100q from %d on", t.Name, t.Digest, t.Start)}
			}
			a := Asserted{Digest: dgst, From: time.Unix(t.Start, 0).UTC()}
			if end := time.Unix(t.End, 0).UTC(); t.End != 0 && !end.After(now) {
				a.Until = end
			}
			out = append(out, a)
		}
		if len(out) > historyMost || page.More && len(page.Tags) == 0 {
			break
		}
		if !page.More {
			slices.Reverse(out)
			return out, nil
		}
	}
	return nil, u.tooLong(base)
}

// chainguardHistory reads Chainguard's list of when a tag was updated, and to what
// (edu.chainguard.dev, "Using the Tag History API"). It begins with the oldest, and ends
// early: what follows is asked for by its start, which may tell the last one once more.
func (u *Upstream) chainguardHistory(ctx context.Context, repository, tag string) ([]Asserted, error) {
	base := "/v2/" + repository + "/_chainguard/history/" + tag
	var out []Asserted
	for path, known := base, 0; len(out) <= historyMost; known = len(out) {
		var list struct {
			History []struct {
				At     string `json:"updateTimestamp"`
				Digest string `json:"digest"`
			} `json:"history"`
		}
		if _, err := u.historyJSON(ctx, path, http.Header{"Accept": {"application/json"}}, &list); err != nil {
			return nil, err
		}
		for _, h := range list.History {
			dgst, err := oci.ParseDigest(h.Digest)
			a := Asserted{Digest: dgst}
			if err == nil {
				a.From, err = stamp(h.At)
			}
			if err != nil {
				return nil, &Error{Upstream: u.name, Op: "GET " + path, Nonsense: true, Caller: u.caller, Err: fmt.Errorf("tag history: %w", err)}
			}
			if !slices.Contains(out[:known], a) {
				out = append(out, a)
			}
		}
		slices.SortStableFunc(out, func(a, b Asserted) int { return a.From.Compare(b.From) })
		if len(list.History) < chainguardPage {
			for i := range max(0, len(out)-1) {
				out[i].Until = out[i+1].From
			}
			return out, nil
		}
		if len(out) == known {
			break // it tells the same again, and might go on
		}
		path = base + "?" + url.Values{"start": {out[len(out)-1].From.Format(time.RFC3339Nano)}}.Encode()
	}
	return nil, u.tooLong(base)
}
