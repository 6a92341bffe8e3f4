// Package audit answers one question: which digest does this tag mean? It keeps
// what every tag means and used to mean in a ledger that can only grow, and the
// proof that it did.
package audit

import (
	"fmt"
	"strings"
)

// A Ref is a tag of a repository of an upstream, written in full:
// docker.io/library/nginx:1.27. None of its parts is empty.
type Ref struct {
	Upstream   string `json:"upstream"`
	Repository string `json:"repository"`
	Tag        string `json:"tag"`
}

func (r Ref) String() string { return r.Upstream + "/" + r.Repository + ":" + r.Tag }

// ParseRef reads what Ref.String wrote. Short forms are the caller's to expand.
func ParseRef(s string) (Ref, error) {
	upstream, rest, ok := strings.Cut(s, "/")
	i := strings.LastIndexByte(rest, ':')
	if !ok || i <= 0 || upstream == "" || i == len(rest)-1 || strings.Contains(rest[i:], "/") {
		return Ref{}, fmt.Errorf("%q is not upstream/repository:tag", s)
	}
	return Ref{upstream, rest[:i], rest[i+1:]}, nil
}
