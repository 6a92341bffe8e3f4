package upstream

import (
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// missingFor is how long a 404 is believed: long enough to spare upstream a
// herd, short enough that push-then-pull works for people.
const missingFor = 3 * time.Second

// missing remembers paths that upstream answered with 404.
type missing struct {
	mu    sync.Mutex
	until *simplelru.LRU[string, time.Time]
}

func (m *missing) init() {
	lru, err := simplelru.NewLRU[string, time.Time](4096, nil)
	if err != nil {
		panic("upstream: " + err.Error()) // the size is not positive
	}
	m.until = lru
}

func (m *missing) has(path string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.until.Get(path)
	return ok && time.Now().Before(t)
}

// Forget has upstream asked again for a manifest that it lately did not have.
func (u *Upstream) Forget(repository, reference string) {
	u.missing.mu.Lock()
	defer u.missing.mu.Unlock()
	u.missing.until.Remove(u.caller + "/v2/" + repository + "/manifests/" + reference)
}

func (m *missing) add(path string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.until.Add(path, time.Now().Add(missingFor))
}

// ForgetMissing has upstream asked again for whatever of a repository it lately
// did not have.
func (u *Upstream) ForgetMissing(repository string) {
	u.missing.mu.Lock()
	defer u.missing.mu.Unlock()
	for _, key := range u.missing.until.Keys() {
		_, rest, ok := strings.Cut(key, "/v2/"+repository+"/") // a key begins with its caller
		for _, route := range []string{"manifests/", "blobs/", "tags/", "referrers/"} {
			if ok && strings.HasPrefix(rest, route) {
				u.missing.until.Remove(key)
			}
		}
	}
}
