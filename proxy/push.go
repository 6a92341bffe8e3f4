package proxy

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"tidemark/cache"
	"tidemark/proxy/oci"
	"tidemark/proxy/upstream"
)

// push passes what changes a repository on to its upstream, with the client's own
// credentials, as it arrives: nothing is held in memory and nothing is kept. What
// a push makes of a tag is in the ledger before the client is told that it
// succeeded, as far as the ledger can be written: upstream has it by then.
func (h *Handler) push(w http.ResponseWriter, r *http.Request, repo repository, req oci.Request, p *Pull) error {
	if !h.o.Push {
		return &oci.Error{Status: http.StatusMethodNotAllowed, Code: oci.Unsupported, Message: "tidemark is a mirror and takes no pushes; push to " + repo.Upstream + " itself, or set registry.push: pass"}
	}
	p.late.Stop()
	p.late = nil // sending takes the time it takes
	client, err := as(repo.upstream, r)
	if err != nil {
		return err
	}
	out, err := h.outgoing(r, repo)
	if err != nil {
		return err
	}
	resp, err := client.Push(r.Context(), out)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	p.Source = cache.Pass.String()
	if resp.StatusCode == http.StatusCreated || resp.StatusCode == http.StatusAccepted {
		p.Unrecorded = h.pushed(r.Context(), r.Method, repo, client, req, resp.Header)
	}
	head := w.Header()
	for _, k := range []string{"Content-Type", "Docker-Content-Digest", "Docker-Upload-Uuid", "Range", "Oci-Subject", "Oci-Chunk-Min-Length", "Retry-After", "Content-Length"} {
		if v := resp.Header.Values(k); v != nil {
			head[k] = v
		}
	}
	if loc := resp.Header.Get("Location"); loc != "" {
		if loc, err = h.incoming(loc, resp.Request.URL, client.Endpoint(), r, repo); err == nil {
			head.Set("Location", loc)
		} else if resp.StatusCode != http.StatusCreated { // where it is that was created, the client knows
			return err
		}
	}
	if err := p.begin(); err != nil {
		return err
	}
	w.WriteHeader(resp.StatusCode)
	_, err = io.Copy(w, io.LimitReader(resp.Body, maxPushAnswer))
	return err
}

// maxPushAnswer bounds the body of an answer to a push in bytes.
const maxPushAnswer = 1 << 20

// outgoing is the request as upstream gets it: under its own name of the
// repository, with what a push needs and nothing else.
func (h *Handler) outgoing(r *http.Request, repo repository) (*upstream.Pushed, error) {
	query := r.URL.Query()
	query.Del("ns")
	if from := query.Get("from"); from != "" && r.Method == http.MethodPost {
		// Another repository whose blob is to be had without sending it.
		target, err := h.from(r, repo, from)
		if err != nil {
			query.Del("from")
			query.Del("mount") // it is sent instead
		} else {
			query.Set("from", target)
		}
	}
	header := http.Header{}
	for _, k := range []string{"Content-Type", "Content-Range", "Accept", "Oci-Chunk-Min-Length"} {
		if v := r.Header.Values(k); v != nil {
			header[k] = v
		}
	}
	rest, ok := strings.CutPrefix(r.URL.EscapedPath(), "/v2/"+repo.Name+"/")
	if !ok {
		return nil, &oci.Error{Status: http.StatusBadRequest, Code: oci.NameInvalid, Message: "the path of the request is written in an unusual way"}
	}
	path := "/v2/" + repo.Repository + "/" + rest
	if name, ok := strings.CutPrefix(rest, "blobs/uploads/"+sealedPrefix); ok {
		if path, ok = h.unsealed(repo, name); !ok {
			return nil, &oci.Error{Status: http.StatusNotFound, Code: oci.BlobUploadUnknown, Message: "this upload was not begun here, or before tidemark was started again; begin it anew"}
		}
	}
	return &upstream.Pushed{
		Method: r.Method, Path: path, Query: query, Header: header,
		Body: r.Body, Length: r.ContentLength,
	}, nil
}

// from is the name that upstream has for a repository to mount from.
func (h *Handler) from(r *http.Request, repo repository, name string) (string, error) {
	ns, hasNS, err := namespace(r.URL)
	if err != nil {
		return "", err
	}
	if !oci.IsName(name) {
		return "", errors.New("not a name")
	}
	target, err := h.o.Table.Route(r.Host, ns, hasNS, name)
	if err != nil {
		return "", err
	}
	if target.Upstream != repo.Upstream {
		return "", errors.New("of another upstream")
	}
	return target.Repository, nil
}

// incoming is a Location of upstream as the client may follow it: through here.
func (h *Handler) incoming(location string, asked, endpoint *url.URL, r *http.Request, repo repository) (string, error) {
	u, err := asked.Parse(location)
	if err != nil {
		return "", &upstream.Error{Upstream: repo.Upstream, Op: r.Method + " " + r.URL.Path, Nonsense: true, Err: errors.New("its Location is no address")}
	}
	if hostPort(u) != hostPort(endpoint) && (u.Hostname() != endpoint.Hostname() || u.Port() != "") {
		return u.String(), nil // an object store that takes the content itself
	}
	path, ok := strings.CutPrefix(u.EscapedPath(), strings.TrimSuffix(endpoint.EscapedPath(), "/"))
	if !ok {
		return "", &upstream.Error{Upstream: repo.Upstream, Op: r.Method + " " + r.URL.Path, Nonsense: true, Err: errors.New("its Location leads away from its endpoint")}
	}
	rest, ok := strings.CutPrefix(path, "/v2/"+repo.Repository+"/")
	if !ok {
		// A registry that goes on elsewhere at its own address, as Google's do.
		rest = "blobs/uploads/" + h.sealed(repo, path)
	}
	path = "/v2/" + repo.Name + "/" + rest
	query := u.RawQuery
	if ns := r.URL.Query().Get("ns"); ns != "" {
		if query != "" {
			query += "&"
		}
		query += "ns=" + url.QueryEscape(ns)
	}
	if query != "" {
		path += "?" + query
	}
	return path, nil
}

// hostPort is the host and port of an address, whether or not it has one.
func hostPort(u *url.URL) string {
	if u.Port() != "" {
		return u.Host
	}
	return net.JoinHostPort(u.Hostname(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
}

// sealedPrefix begins the name of an upload that goes on at a path of its own.
const sealedPrefix = "~"

// sealed is the name of an upload into a repository that goes on at another path of
// its upstream. Only we can make one, and it is good for that repository: a client
// cannot choose the path, nor have what it uploads taken for another repository's.
func (h *Handler) sealed(repo repository, path string) string {
	return sealedPrefix + base64.RawURLEncoding.EncodeToString(h.seal(repo, path)) + "." + base64.RawURLEncoding.EncodeToString([]byte(path))
}

func (h *Handler) seal(repo repository, path string) []byte {
	m := hmac.New(sha256.New, h.uploads[:])
	m.Write([]byte(repo.Upstream + "\x00" + repo.Repository + "\x00" + path))
	return m.Sum(nil)
}

// unsealed is the path of upstream at which an upload goes on.
func (h *Handler) unsealed(repo repository, name string) (path string, ok bool) {
	sum, encoded, ok := strings.Cut(strings.TrimPrefix(name, sealedPrefix), ".")
	if !ok {
		return "", false
	}
	plain, err := base64.RawURLEncoding.DecodeString(encoded)
	given, gerr := base64.RawURLEncoding.DecodeString(sum)
	if err != nil || gerr != nil || !hmac.Equal(given, h.seal(repo, string(plain))) {
		return "", false
	}
	return string(plain), true
}

// pushed takes note of what upstream has now. What it returns is why the move of a
// tag is not in the ledger yet: who pulls the tag next asks again.
func (h *Handler) pushed(ctx context.Context, method string, repo repository, client *upstream.Upstream, req oci.Request, head http.Header) error {
	client.ForgetMissing(repo.Repository)
	if req.Tag == "" || method != http.MethodPut {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), h.o.Patience)
	defer cancel()
	// With the rights that pulls have: what only the one who pushed may read is not to
	// be known to others.
	_, err := h.o.Ledger.Ask(ctx, repo.ref(req.Tag), repo.ask(req.Tag, "push"))
	return err
}
