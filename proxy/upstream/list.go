package upstream

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/proxy/oci"
)

// maxTagList bounds one page of tags in bytes. The Hub's longest repositories
// answer with about 1 MiB when asked for everything at once.
const maxTagList = 16 << 20

// Tags returns one page of a repository's tags as upstream pages them, and the
// query of the next page, "" at the end.
func (u *Upstream) Tags(ctx context.Context, repository string, query url.Values) (tags []string, next url.Values, err error) {
	path := "/v2/" + repository + "/tags/list"
	if q := query.Encode(); q != "" {
		path += "?" + q
	}
	resp, err := u.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := u.readAll(resp, path, maxTagList)
	if err != nil {
		return nil, nil, err
	}
	var list struct {
		Tags []string `json:"tags"`
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, nil, u.nonsense(resp.Request, fmt.Errorf("tag list: %w", err))
	}
	if link, ok := nextLink(resp.Header.Get("Link")); ok {
		next = link.Query()
	}
	return list.Tags, next, nil
}

// A Referrer is a manifest whose subject is another, as upstream describes it.
type Referrer struct {
	ArtifactType string
	Digest       string
	Descriptor   json.RawMessage // as it was sent
}

// UnmarshalJSON implements json.Unmarshaler.
func (r *Referrer) UnmarshalJSON(b []byte) error {
	var d struct {
		ArtifactType string `json:"artifactType"`
		Digest       string `json:"digest"`
	}
	if err := json.Unmarshal(b, &d); err != nil {
		return err
	}
	r.ArtifactType, r.Digest, r.Descriptor = d.ArtifactType, d.Digest, json.RawMessage(bytes.Clone(b))
	return nil
}

// MarshalJSON implements json.Marshaler.
func (r Referrer) MarshalJSON() ([]byte, error) { return r.Descriptor, nil }

// referrerPages bounds the pages of a list of referrers.
const referrerPages = 50

// Referrers returns all manifests of a repository whose subject is a digest
// (distribution-spec, "Listing Referrers"). A registry that keeps no such lists
// is a 404.
func (u *Upstream) Referrers(ctx context.Context, repository string, subject digest.Digest) ([]Referrer, error) {
	base := "/v2/" + repository + "/referrers/" + subject.String()
	var all []Referrer
	path, size := base, 0
	for range referrerPages {
		page, next, err := u.referrersPage(ctx, path)
		if err != nil {
			return nil, err
		}
		for _, r := range page {
			size += len(r.Descriptor)
		}
		if all = append(all, page...); size > oci.MaxManifest {
			break
		}
		if next == nil {
			return all, nil
		}
		path = base + "?" + next.Query().Encode()
	}
	return nil, &Error{Upstream: u.name, Op: "GET " + base, Nonsense: true, Caller: u.caller, Err: errors.New("the list of referrers is too long")}
}

func (u *Upstream) referrersPage(ctx context.Context, path string) (page []Referrer, next *url.URL, err error) {
	resp, err := u.do(ctx, http.MethodGet, path, http.Header{"Accept": {ocispec.MediaTypeImageIndex}})
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := u.readAll(resp, path, oci.MaxManifest)
	if err != nil {
		return nil, nil, err
	}
	if t, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || t != ocispec.MediaTypeImageIndex {
		// A page for people, or something else that is no list.
		return nil, nil, &Error{Upstream: u.name, Op: "GET " + path, Status: http.StatusNotFound, Message: "no list of referrers", Caller: u.caller}
	}
	var list struct {
		Manifests []Referrer `json:"manifests"`
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, nil, u.nonsense(resp.Request, fmt.Errorf("list of referrers: %w", err))
	}
	if link, ok := nextLink(resp.Header.Get("Link")); ok {
		next = link
	}
	return list.Manifests, next, nil
}

// nextLink finds the target of rel="next" (RFC 8288).
func nextLink(header string) (*url.URL, bool) {
	for link := range strings.SplitSeq(header, ",") {
		target, params, ok := strings.Cut(strings.TrimSpace(link), ">")
		if !ok || !strings.HasPrefix(target, "<") || !strings.Contains(strings.ReplaceAll(params, `"`, ""), "rel=next") {
			continue
		}
		if u, err := url.Parse(target[1:]); err == nil {
			return u, true
		}
	}
	return nil, false
}
