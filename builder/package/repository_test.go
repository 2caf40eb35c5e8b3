//go:build packages

/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package packagetest

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// repository is what `make repository` makes, behind a web server on loopback.
type repository struct {
	t                   *testing.T
	dist, dir, home, of string
	url                 string
}

// newRepository makes one of the packages for this machine.
func newRepository(t *testing.T) *repository {
	t.Helper()
	r := &repository{t: t, dist: t.TempDir(), dir: filepath.Join(t.TempDir(), "repository"), home: t.TempDir()}
	require.NoError(t, os.Chmod(r.home, 0o700))
	for _, p := range []string{pkg, otherPkg} {
		for _, pattern := range []string{p + "_*_" + debArch(runtime.GOARCH) + ".deb", p + "_*.dsc", p + "_*.tar.xz",
			p + "-*." + rpmArch(runtime.GOARCH) + ".rpm", p + "-*.src.rpm"} {
			files, err := filepath.Glob(filepath.Join(variable(t, "DIST"), pattern))
			require.NoError(t, err)
			require.NotEmpty(t, files, pattern)
			host(t, "cp", append(files, r.dist)...)
		}
	}
	r.of = r.key("release@test.invalid")
	r.make(r.of)
	server := httptest.NewServer(http.FileServer(http.Dir(r.dir)))
	t.Cleanup(server.Close)
	r.url = server.URL
	return r
}

// key makes a key and returns its fingerprint.
func (r *repository) key(name string) string {
	r.t.Helper()
	r.t.Setenv("GNUPGHOME", r.home)
	host(r.t, "gpg", "--batch", "--passphrase", "", "--quick-generate-key", name, "rsa3072", "sign", "never")
	r.t.Cleanup(func() { host(r.t, "gpgconf", "--kill", "all") })
	return regexp.MustCompile(`(?m)^fpr:+([0-9A-F]+):`).FindStringSubmatch(host(r.t, "gpg", "--batch", "--with-colons", "--list-keys", name))[1]
}

func (r *repository) make(key string) {
	r.t.Helper()
	r.t.Setenv("GNUPGHOME", r.home)
	r.t.Setenv("GOFLAGS", "")
	host(r.t, "make", "-C", "../..", "repository", "KEY="+key, "DIST="+r.dist, "REPOSITORY="+r.dir)
}

// next adds to the packages one of the next patch release of containerd.
func (r *repository) next(root *root) {
	r.t.Helper()
	root.run("dpkg-deb -R " + deb(r.t, pkg) + ` /root/next
sed -i -E 's/^(Version: [0-9]+\.[0-9]+)\.[0-9]+/\1.99/' /root/next/DEBIAN/control
dpkg-deb --build -Znone /root/next /root/next.deb >/dev/null`)
	host(r.t, "cp", filepath.Join(root.dir, "upper/root/next.deb"), filepath.Join(r.dist, pkg+"_next_"+debArch(runtime.GOARCH)+".deb"))
}

// spoil adds a byte to each file that matches.
func (r *repository) spoil(pattern string) {
	r.t.Helper()
	files, err := filepath.Glob(filepath.Join(r.dir, pattern))
	require.NoError(r.t, err)
	require.NotEmpty(r.t, files)
	for _, file := range files {
		f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
		require.NoError(r.t, err)
		_, err = f.WriteString("x")
		require.NoError(r.t, err)
		require.NoError(r.t, f.Close())
	}
}

// As a user would: told the repository and its key.
func TestAptRepository(t *testing.T) {
	repo := newRepository(t)
	r := newRoot(t)
	r.run("apt-get install -y -qq --no-install-recommends containerd gnupg")
	key, err := os.ReadFile(filepath.Join(repo.dir, "guest-pull.asc"))
	require.NoError(t, err)
	r.run("cat >/etc/apt/keyrings/guest-pull.asc <<'END'\n" + string(key) + "END\n" +
		"echo 'deb [signed-by=/etc/apt/keyrings/guest-pull.asc] " + repo.url + "/deb stable main' >/etc/apt/sources.list.d/guest-pull.list\napt-get update")
	r.run("apt-get dist-upgrade -y")
	assert.Equal(t, "containerd ii\n", r.installed(), "no upgrade replaces another containerd")

	r.run("apt-get install -y --no-install-recommends " + pkg)
	assert.Equal(t, "containerd rc\n"+pkg+" ii\n", r.installed())
	repo.next(r)
	repo.make(repo.of)
	r.run("apt-get update && apt-get dist-upgrade -y")
	assert.Contains(t, r.run("dpkg-query -W -f '${Version}' "+pkg), line+".99+guestpull.")
	r.run("apt-get install -y " + otherPkg + " && apt-get dist-upgrade -y")
	assert.Contains(t, r.installed(), otherPkg+" ii\n")
	r.run("apt-get purge -y " + otherPkg + " " + pkg)
	assert.NotContains(t, r.installed(), pkg)

	repo.spoil("deb/pool/*.deb")
	// Not those that it has from before.
	out, err := r.try("apt-get clean; apt-get install -y --no-install-recommends "+pkg, false)
	require.Error(t, err, out)
	assert.Regexp(t, "unexpected size|Hash Sum mismatch", out)
	assert.NotContains(t, r.installed(), pkg)

	repo.make(repo.key("another@test.invalid"))
	out, err = r.try("apt-get update -o APT::Update::Error-Mode=any", false)
	require.Error(t, err, out)
	assert.Regexp(t, "NO_PUBKEY|not signed|Missing key", out)
}

func TestDNFRepository(t *testing.T) {
	repo := newRepository(t)
	r := newRoot(t)
	r.run("apt-get install -y -qq --no-install-recommends rpm dnf createrepo-c gnupg && mkdir /repository")
	for _, name := range []string{"runc", "fuse3", "containerd"} {
		r.standIn(name, "1.7.0", "")
	}
	r.standIn("dash", "1", "Provides: /bin/sh")
	r.run(`createrepo_c --quiet /repository
mkdir -p /etc/yum.repos.d
printf '[test]\nname=test\nbaseurl=file:///repository\ngpgcheck=0\n' >/etc/yum.repos.d/test.repo
printf '[guest-pull]\nname=guest-pull\nbaseurl=` + repo.url + `/rpm\ngpgcheck=1\nrepo_gpgcheck=1\ngpgkey=` + repo.url + `/guest-pull.asc\n' >/etc/yum.repos.d/guest-pull.repo
dnf install -y containerd && dnf upgrade -y`)
	installed := func() string { return r.run("rpm -qa --qf '%{NAME}\n' 'containerd*' | sort") }
	assert.Equal(t, "containerd\n", installed(), "no upgrade replaces another containerd")

	for _, p := range []string{pkg, otherPkg} {
		r.run("dnf install -y --allowerasing " + p + " && dnf upgrade -y")
		assert.Equal(t, p+"\n", installed())
		assert.Contains(t, r.run("containerd --version"), "+guest-pull.")
	}
	// The next patch release of containerd, as far as dnf can tell.
	r.standIn(otherPkg, other+".99+guestpull.0.2.0", "Requires: runc, fuse3\nConflicts: containerd")
	host(t, "cp", filepath.Join(r.dir, "upper/repository", otherPkg+"-"+other+".99+guestpull.0.2.0.rpm"), repo.dist)
	repo.make(repo.of)
	r.run("dnf clean expire-cache && dnf upgrade -y")
	assert.Equal(t, other+".99+guestpull.0.2.0\n", r.run("rpm -q --qf '%{VERSION}\n' "+otherPkg))
	r.run("dnf remove -y " + otherPkg)
	assert.Empty(t, installed())

	// A package that is another one than the list says.
	repo.spoil("rpm/*.rpm")
	out, err := r.try("dnf clean packages; dnf install -y "+pkg, false)
	require.Error(t, err, out)
	assert.Empty(t, installed())

	// Lists and packages that somebody else has signed.
	key, err := os.ReadFile(filepath.Join(repo.dir, "guest-pull.asc"))
	require.NoError(t, err)
	repo.make(repo.key("another@test.invalid"))
	require.NoError(t, os.WriteFile(filepath.Join(repo.dir, "guest-pull.asc"), key, 0o644))
	out, err = r.try("dnf clean all && dnf install -y "+pkg, false)
	require.Error(t, err, out)
	assert.Empty(t, installed())
	out, err = r.try("dnf clean all && dnf install -y --setopt=guest-pull.repo_gpgcheck=0 "+pkg, false)
	require.Error(t, err, out)
	assert.Empty(t, installed())
}
