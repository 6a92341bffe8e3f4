// Package oci is the /v2 grammar of the OCI distribution specification: what a
// request asks for, how an error is told, and what a manifest refers to.
package oci

import (
	_ "crypto/sha256" // registered for go-digest
	_ "crypto/sha512"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"
)

// A Kind says which part of the specification a request uses.
type Kind int

// The kinds of request that a pull consists of. Everything that would change a
// repository is Push, whatever its route.
const (
	Invalid       Kind = iota // what Parse refused
	Ping                      // GET /v2/
	Manifest                  // GET, HEAD /v2/<name>/manifests/<tag or digest>
	Blob                      // GET, HEAD /v2/<name>/blobs/<digest>
	TagList                   // GET /v2/<name>/tags/list
	Referrers                 // GET /v2/<name>/referrers/<digest>
	Catalog                   // GET /v2/_catalog
	TagHistory                // GET /v2/<name>/_tidemark/tag-history/<tag>
	OCITagHistory             // GET /v2/<name>/_oci/tag-history/<tag> (distribution-spec#606, a proposal)
	Push                      // POST, PUT, PATCH, DELETE and upload sessions
)

var kindNames = [...]string{Invalid: "invalid", Ping: "ping", Manifest: "manifest", Blob: "blob", TagList: "tags", Referrers: "referrers", Catalog: "catalog", TagHistory: "tag-history", OCITagHistory: "tag-history", Push: "push"}

// String is the kind as logs and metrics name it.
func (k Kind) String() string { return kindNames[k] }

// A Request is a valid request of the /v2 API. Name follows the grammar of the
// specification; of Tag and Digest at most one is set, and a Digest is one of
// a registered algorithm in full length.
type Request struct {
	Kind   Kind
	Name   string // as written in the path; package route says what it means
	Tag    string
	Digest digest.Digest
}

// The grammars of distribution-spec, "Pulling manifests". The length of a name
// is bounded by what hosts and paths can carry together (255).
var (
	nameGrammar = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagGrammar  = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

const maxName = 255

// Parse reads a request from its method and decoded path. What it refuses, it
// refuses with an *Error that can be written to the client as it is.
func Parse(method, path string) (Request, error) {
	rest, ok := strings.CutPrefix(path, "/v2")
	if !ok || (rest != "" && rest[0] != '/') {
		return Request{}, notFound(path)
	}
	if rest == "" || rest == "/" {
		if !reads(method) {
			return Request{}, notAllowed(method, path)
		}
		return Request{Kind: Ping}, nil
	}
	if rest == "/_catalog" {
		if !reads(method) {
			return Request{}, notAllowed(method, path)
		}
		return Request{Kind: Catalog}, nil
	}
	name, kind, ref, ok := split(rest[1:], !reads(method))
	if !ok {
		return Request{}, notFound(path)
	}
	if !IsName(name) {
		return Request{}, &Error{http.StatusBadRequest, NameInvalid, fmt.Sprintf("repository name %.300q is not valid: lower-case letters, digits and single separators, components divided by /", name), nil}
	}
	req := Request{Kind: kind, Name: name}
	if !reads(method) {
		req.Kind = Push
	}
	if kind == TagList || kind == Push {
		return req, nil
	}
	if kind == TagHistory || kind == OCITagHistory || kind == Manifest && !strings.Contains(ref, ":") {
		if !tagGrammar.MatchString(ref) {
			return Request{}, &Error{http.StatusBadRequest, TagInvalid, fmt.Sprintf("tag %.200q is not valid: up to 128 letters, digits, '_', '.' and '-', not starting with '.' or '-'", ref), nil}
		}
		req.Tag = ref
		return req, nil
	}
	dgst, err := ParseDigest(ref)
	if err != nil {
		return Request{}, err
	}
	req.Digest = dgst
	return req, nil
}

// IsName tells whether a text is the name of a repository.
func IsName(s string) bool { return len(s) <= maxName && nameGrammar.MatchString(s) }

// ReferrersTag is the tag under which clients keep what refers to a manifest
// where the registry has no list of it (distribution-spec, "Referrers Tag Schema").
func ReferrersTag(subject digest.Digest) string {
	algorithm, encoded := subject.Algorithm().String(), subject.Encoded()
	return algorithm[:min(len(algorithm), 32)] + "-" + encoded[:min(len(encoded), 64)]
}

// ParseDigest reads a digest of an algorithm that the image specification
// registers (sha256, sha512).
func ParseDigest(s string) (digest.Digest, error) {
	d, err := digest.Parse(s)
	if err == nil && d.Algorithm() != digest.SHA256 && d.Algorithm() != digest.SHA512 {
		err = digest.ErrDigestUnsupported
	}
	if err != nil {
		return "", &Error{http.StatusBadRequest, DigestInvalid, fmt.Sprintf("digest %.200q is not valid: %v", s, err), nil}
	}
	return d, nil
}

func reads(method string) bool { return method == http.MethodGet || method == http.MethodHead }

// split finds the route in the path after /v2/. A name may contain the words of
// a route, so the last two components decide; but what follows an upload, which
// a change goes on with, is the registry's own business.
func split(path string, changes bool) (name string, kind Kind, ref string, ok bool) {
	if i := strings.LastIndex(path, "/blobs/uploads/"); changes && i >= 0 {
		return path[:i], Push, "", !leadsAway(path[i:])
	}
	head, ref, ok := cutLast(path)
	if !ok {
		return "", 0, "", false
	}
	if name, ok := strings.CutSuffix(head, "/blobs/uploads"); ok {
		return name, Push, "", !leadsAway(ref)
	}
	name, word, ok := cutLast(head)
	if !ok {
		return "", 0, "", false
	}
	switch {
	case word == "manifests":
		return name, Manifest, ref, true
	case word == "blobs" && ref == "uploads":
		return name, Push, "", true
	case word == "blobs":
		return name, Blob, ref, true
	case word == "tags" && ref == "list":
		return name, TagList, "", true
	case word == "referrers":
		return name, Referrers, ref, true
	case word == "tag-history":
		// No name has a component that begins with _.
		if name, ok := strings.CutSuffix(name, "/_tidemark"); ok {
			return name, TagHistory, ref, true
		}
		if name, ok := strings.CutSuffix(name, "/_oci"); ok {
			return name, OCITagHistory, ref, true
		}
	}
	return "", 0, "", false
}

// leadsAway tells a path that whoever reads it next may take for another one.
func leadsAway(path string) bool {
	for component := range strings.SplitSeq(path, "/") {
		for range 3 { // however often it is decoded on the way
			component, _, _ = strings.Cut(component, ";") // parameters, as some servers read them
			if component == "." || component == ".." || strings.ContainsAny(component, "/\\") {
				return true
			}
			decoded, err := url.PathUnescape(component)
			if err != nil || decoded == component {
				break
			}
			component = decoded
		}
	}
	return false
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", "", false
	}
	return s[:i], s[i+1:], true
}
