package upstream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
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
)

// TagHistory returns what a tag meant in the past, oldest first, as upstream tells it
// in the way of a kind, and the name of the list. An upstream that offers none is
// errors.ErrUnsupported. Quay's API takes other credentials than its registry: it tells
// of public repositories.
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
			if told, err = u.ociHistory(ctx, repository, tag, source); !errors.Is(err, fs.ErrNotExist) {
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
	return errors.As(err, &e) && slices.Contains([]int{http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented}, e.Status)
}

// plausible refuses what cannot be a history: it is sorted here.
func plausible(told []Asserted, now time.Time) error {
	slices.SortStableFunc(told, func(a, b Asserted) int { return a.From.Compare(b.From) })
	for i, a := range told {
		switch {
		case a.From.Before(time.Unix(0, 0)) || a.From.After(now.Add(time.Hour)):
			return fmt.Errorf("it says that %s was meant from %s on", a.Digest, a.From.Format(time.RFC3339))
		case !a.Until.IsZero() && a.Until.Before(a.From):
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
		next = link
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
	var newest []ocispec.Descriptor
	path := base
	for range historyPages {
		var page ocispec.Index
		next, err := u.historyJSON(ctx, path, http.Header{"Accept": {ocispec.MediaTypeImageIndex}}, &page)
		if err != nil {
			return nil, err
		}
		newest = append(newest, page.Manifests...)
		if next == nil {
			return u.ociStretches(base, newest)
		}
		if len(newest) > historyMost {
			break
		}
		path = base + "?" + next.Query().Encode() // only its query: a link leads to no other place
	}
	return nil, u.tooLong(base)
}

func (u *Upstream) ociStretches(path string, newest []ocispec.Descriptor) ([]Asserted, error) {
	var out []Asserted
	var ended time.Time // when the one before, which is later, began
	for _, d := range newest {
		from, err := stamp(d.Annotations["org.opencontainers.tag.created"])
		if err == nil {
			_, err = oci.ParseDigest(d.Digest.String())
		}
		until := ended
		for _, key := range []string{"dev.tidemark.tag.ended", "org.opencontainers.tag.deleted"} {
			if s := d.Annotations[key]; s != "" && err == nil {
				until, err = stamp(s)
			}
		}
		if err != nil {
			return nil, &Error{Upstream: u.name, Op: "GET " + path, Nonsense: true, Caller: u.caller, Err: fmt.Errorf("tag history: %w", err)}
		}
		out = append(out, Asserted{Digest: d.Digest, MediaType: d.MediaType, Size: d.Size, From: from, Until: until})
		ended = from
	}
	return out, nil
}

func stamp(s string) (time.Time, error) {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return t, fmt.Errorf("%.50q is no time", s)
	}
	return t.UTC().Truncate(time.Millisecond), nil
}

// quayHistory reads Quay's list of what a tag meant (docs.quay.io, API, listRepoTags).
func (u *Upstream) quayHistory(ctx context.Context, repository, tag string) ([]Asserted, error) {
	base := "/api/v1/repository/" + repository + "/tag/"
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
			if t.End != 0 {
				a.Until = time.Unix(t.End, 0).UTC()
			}
			out = append(out, a)
		}
		if !page.More {
			return out, nil
		}
		if len(page.Tags) == 0 || len(out) > historyMost {
			break
		}
	}
	return nil, u.tooLong(base)
}

// chainguardHistory reads Chainguard's list of when a tag was updated, and to what
// (edu.chainguard.dev, "Using the Tag History API").
func (u *Upstream) chainguardHistory(ctx context.Context, repository, tag string) ([]Asserted, error) {
	path := "/v2/" + repository + "/_chainguard/history/" + tag
	var list struct {
		History []struct {
			At     string `json:"updateTimestamp"`
			Digest string `json:"digest"`
		} `json:"history"`
	}
	if _, err := u.historyJSON(ctx, path, http.Header{"Accept": {"application/json"}}, &list); err != nil {
		return nil, err
	}
	if len(list.History) > historyMost {
		return nil, u.tooLong(path)
	}
	var out []Asserted
	for _, h := range list.History {
		dgst, err := oci.ParseDigest(h.Digest)
		var from time.Time
		if err == nil {
			from, err = stamp(h.At)
		}
		if err != nil {
			return nil, &Error{Upstream: u.name, Op: "GET " + path, Nonsense: true, Caller: u.caller, Err: fmt.Errorf("tag history: %w", err)}
		}
		out = append(out, Asserted{Digest: dgst, From: from})
	}
	slices.SortStableFunc(out, func(a, b Asserted) int { return a.From.Compare(b.From) })
	for i := range max(0, len(out)-1) {
		out[i].Until = out[i+1].From
	}
	return out, nil
}
