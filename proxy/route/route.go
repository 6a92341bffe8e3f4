// Package route says which upstream and repository a request means.
package route

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
)

// A Target is a repository of a configured upstream.
type Target struct {
	Upstream   string // a name from the configuration, such as docker.io
	Repository string // as the upstream knows it, such as library/nginx
	Name       string // as the client wrote it
}

// An Upstream is a registry that requests can mean.
type Upstream struct {
	Name  string
	Hosts []string // request hosts that mean it, besides its own name
}

// A Table is the closed world of upstreams. What a request says selects an
// entry of it and never becomes an address to dial. A Table does not change.
type Table struct {
	fallback string
	names    map[string]bool
	hosts    map[string]string // lower-case request host -> upstream
}

// ErrUnknown reports a request that names no configured upstream.
type ErrUnknown struct{ What, Name string }

func (e *ErrUnknown) Error() string {
	return fmt.Sprintf("%s %.300q names no upstream configured here; add it under upstreams: in tidemark's configuration", e.What, e.Name)
}

// NewTable returns the table of upstreams, of which fallback answers for
// requests that name none. A host that means two upstreams is an error.
func NewTable(fallback string, upstreams []Upstream) (*Table, error) {
	t := &Table{fallback: fallback, names: make(map[string]bool), hosts: make(map[string]string)}
	for _, u := range upstreams {
		t.names[u.Name] = true
		for _, h := range append([]string{u.Name}, u.Hosts...) {
			h = strings.ToLower(h)
			if other, ok := t.hosts[h]; ok && other != u.Name {
				return nil, fmt.Errorf("host %s means both %s and %s", h, other, u.Name)
			}
			t.hosts[h] = u.Name
		}
	}
	if !t.names[fallback] {
		return nil, fmt.Errorf("default upstream %s is not configured", fallback)
	}
	return t, nil
}

// Route finds the target of a request, by, in this order: the ns query
// parameter (distribution-spec, "Registry Proxying"), the request's Host, a
// first component of name that names an upstream, the default upstream. hasNS
// tells an empty ns, which is an error, from an absent one.
func (t *Table) Route(host, ns string, hasNS bool, name string) (Target, error) {
	if hasNS {
		up, ok := t.hosts[strings.ToLower(ns)]
		if !ok {
			return Target{}, &ErrUnknown{"ns", ns}
		}
		return target(up, name, name), nil
	}
	if up, ok := t.byHost(host); ok {
		return target(up, name, name), nil
	}
	if first, rest, ok := strings.Cut(name, "/"); ok {
		if t.names[first] {
			return target(first, rest, name), nil
		}
		// Docker reads a first component with a dot as a host name, and no
		// namespace of the Hub has one.
		if t.fallback == dockerHub && strings.Contains(first, ".") {
			return Target{}, &ErrUnknown{"registry", first}
		}
	}
	return target(t.fallback, name, name), nil
}

// Upstream is the upstream that a request means which names no repository: by ns,
// by Host, else the default one.
func (t *Table) Upstream(host, ns string, hasNS bool) (string, error) {
	if hasNS {
		up, ok := t.hosts[strings.ToLower(ns)]
		if !ok {
			return "", &ErrUnknown{"ns", ns}
		}
		return up, nil
	}
	if up, ok := t.byHost(host); ok {
		return up, nil
	}
	return t.fallback, nil
}

// IsHost tells whether a request's Host means an upstream.
func (t *Table) IsHost(host string) bool {
	_, ok := t.byHost(host)
	return ok
}

// Hosts are the request hosts that mean an upstream, sorted, in lower case.
func (t *Table) Hosts() []string { return slices.Sorted(maps.Keys(t.hosts)) }

func (t *Table) byHost(host string) (string, bool) {
	host = strings.ToLower(host)
	if up, ok := t.hosts[host]; ok {
		return up, true
	}
	if h, _, err := net.SplitHostPort(host); err == nil {
		up, ok := t.hosts[h]
		return up, ok
	}
	return "", false
}

// dockerHub is the one registry whose official images are written without
// their namespace.
const dockerHub = "docker.io"

func target(upstream, repository, name string) Target {
	if upstream == dockerHub && !strings.Contains(repository, "/") {
		repository = "library/" + repository
	}
	return Target{upstream, repository, name}
}
