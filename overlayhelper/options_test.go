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

package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// secret stands for whatever an option's value may hold.
const secret = "c2VjcmV0IHZvbHVtZQ=="

func TestParseArgs(t *testing.T) {
	plain := overlay{source: "overlay", target: "/mnt", lower: []layer{{path: "/a"}, {path: "/b"}}}
	with := func(change func(*overlay)) overlay {
		ov := plain
		change(&ov)
		return ov
	}
	const lower = "lowerdir=/a:/b"

	for _, tc := range []struct {
		name string
		args []string
		want request
	}{
		{
			name: "as mount.fuse calls",
			args: []string{"overlay", "/mnt", "-o", lower + "," + volumeOption + "=" + secret + ",dev,suid"},
			want: request{overlay: plain},
		},
		{
			name: "as mount(8) calls a helper",
			args: []string{"overlay", "/mnt", "-sfnv", "-o", "rw," + lower, "-t", "fuse.guest-pull-overlayfs", "-N", "/proc/7/ns/mnt"},
			want: request{fake: true, verbose: true, namespace: "/proc/7/ns/mnt", overlay: plain},
		},
		{
			name: "several lists, flags first, values attached",
			args: []string{"-o" + lower, "-vo", "ro", "-N7", "overlay", "-ox-note=1", "/mnt"},
			want: request{verbose: true, namespace: "7", overlay: with(func(o *overlay) { o.flags = unix.MS_RDONLY })},
		},
		{
			name: "words after --",
			args: []string{"-o", lower, "--", "-s", "-t"},
			want: request{overlay: with(func(o *overlay) { o.source, o.target = "-s", "-t" })},
		},
		{
			name: "empty options are nothing",
			args: []string{"overlay", "/mnt", "-o", ",," + lower + ",", "-o", ","},
			want: request{overlay: plain},
		},
		{
			name: "upper, work and options of overlayfs in their order",
			args: []string{"overlay", "/mnt", "-o", `workdir=/w\,1,upperdir=/u\:1\\2,index=off,userxattr,empty=,index=on`, "-o", lower},
			want: request{overlay: with(func(o *overlay) {
				o.upper, o.work = `/u:1\2`, "/w,1"
				o.other = []option{{"index", "off", true}, {"userxattr", "", false}, {"empty", "", true}, {"index", "on", true}}
			})},
		},
		{
			name: "a context has commas in its quotes",
			args: []string{"overlay", "/mnt", "-o", `context="system_u:object_r:x_t:s0:c1,c2",nodev,` + lower},
			want: request{overlay: with(func(o *overlay) {
				o.flags = unix.MS_NODEV
				o.other = []option{{"context", `"system_u:object_r:x_t:s0:c1,c2"`, true}}
			})},
		},
		{
			name: "a quote in a path is a quote",
			args: []string{"overlay", "/mnt", "-o", `lowerdir="/a:/b",ro`},
			want: request{overlay: with(func(o *overlay) {
				o.lower, o.flags = []layer{{path: `"/a`}, {path: `/b"`}}, unix.MS_RDONLY
			})},
		},
		{
			name: "the volume without a value",
			args: []string{"overlay", "/mnt", "-o", lower + "," + volumeOption},
			want: request{overlay: plain},
		},
		{
			name: "other Kata options are overlayfs's to judge",
			args: []string{"overlay", "/mnt", "-o", lower + ",io.katacontainers.fs-opt.x=1"},
			want: request{overlay: with(func(o *overlay) { o.other = []option{{"io.katacontainers.fs-opt.x", "1", true}} })},
		},
		{name: "help wins over errors in words", args: []string{"-h"}, want: request{help: true}},
		{name: "long help", args: []string{"--help"}, want: request{help: true}},
		{name: "version", args: []string{"--version"}, want: request{version: true}},
		{name: "short version", args: []string{"-V"}, want: request{version: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := parseArgs(tc.args)
			require.NoError(t, err)
			assert.Equal(t, &tc.want, got)
		})
	}
}

// Whatever is wrong, the message tells which option and never a value: it goes
// to containerd's log and to pod events.
func TestParseArgsErrors(t *testing.T) {
	const lower = "lowerdir=/a:/b"
	opts := func(o string) []string { return []string{"overlay", "/mnt", "-o", o} }

	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"nothing", nil, "there are 0 arguments"},
		{"no target", []string{"overlay", "-o", lower}, "there are 1 arguments"},
		{"options without -o", []string{"overlay", "/mnt", volumeOption + "=" + secret}, "there are 3 arguments"},
		{"empty target", []string{"overlay", ""}, "target is empty"},
		{"unknown flag", []string{"-vx" + secret, "overlay", "/mnt"}, "unknown flag -x"},
		{"unknown long flag", []string{"--option=" + secret, "overlay", "/mnt"}, "unknown flag --option"},
		{"odd long flag", []string{"--" + secret, "overlay", "/mnt"}, "unknown flag --(not shown)"},
		{"no value for -o", []string{"overlay", "/mnt", "-o"}, "flag -o needs a value"},
		{"no value for -t", []string{"overlay", "/mnt", "-vt"}, "flag -t needs a value"},
		{"no options", []string{"overlay", "/mnt"}, "/mnt: option lowerdir is missing"},
		{"only the volume", opts(volumeOption + "=" + secret), "option lowerdir is missing"},
		{"lowerdir without value", opts("lowerdir"), "option lowerdir is empty"},
		{"empty lowerdir", opts("lowerdir="), "option lowerdir is empty"},
		{"leading colon", opts("lowerdir=:/a"), "has an empty path"},
		{"trailing colon", opts("lowerdir=/a:"), "has an empty path"},
		{"three colons", opts("lowerdir=/a:::/b"), "has an empty path"},
		{"layer below data", opts("lowerdir=/a::/b:/c"), "data layers come last"},
		{"lowerdir twice", opts(lower + "," + lower), "option lowerdir is given twice"},
		{"upperdir twice", opts(lower + ",upperdir=/u,upperdir=/u"), "option upperdir is given twice"},
		{"empty upperdir", opts(lower + ",upperdir="), "option upperdir has no value"},
		{"workdir without value", opts(lower + ",workdir"), "option workdir has no value"},
		{"no workdir", opts(lower + ",upperdir=/u"), "option workdir is missing"},
		{"backslash at the end", opts(lower + `\`), `end in a "\"`},
		{"open quote", opts(lower + `,context="` + secret), "option context has no closing quote"},
		{"remount", opts("remount,ro"), `option remount is not supported here; use "mount -i -o remount`},
		{"bind", opts(lower + ",bind"), "option bind is not supported"},
		{"rbind", opts(lower + ",rbind"), "option rbind is not supported"},
		{"move", opts(lower + ",move"), "option move is not supported"},
		{"propagation", opts(lower + ",rslave"), `use "mount --make-rslave TARGET" afterwards`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			req, err := parseArgs(tc.args)
			require.ErrorContains(t, err, tc.want)
			assert.Nil(t, req)
			assert.NotContains(t, err.Error(), secret)
			assert.NotContains(t, err.Error(), "\n")
		})
	}
}

// A flag that an option should clear must not be set by it: the widespread
// nydus-overlayfs sets MS_NODEV for "dev", which mount.fuse always appends.
func TestGenericOptions(t *testing.T) {
	for opts, want := range map[string]uintptr{
		"ro":                  unix.MS_RDONLY,
		"ro,rw":               0,
		"rw,ro":               unix.MS_RDONLY,
		"dev,suid":            0,
		"nodev,nosuid":        unix.MS_NODEV | unix.MS_NOSUID,
		"nodev,nosuid,dev":    unix.MS_NOSUID,
		"noexec":              unix.MS_NOEXEC,
		"noexec,exec":         0,
		"sync":                unix.MS_SYNCHRONOUS,
		"sync,async":          0,
		"dirsync":             unix.MS_DIRSYNC,
		"mand":                unix.MS_MANDLOCK,
		"mand,nomand":         0,
		"noatime":             unix.MS_NOATIME,
		"noatime,atime":       0,
		"nodiratime":          unix.MS_NODIRATIME,
		"nodiratime,diratime": 0,
		"relatime":            unix.MS_RELATIME,
		"relatime,norelatime": 0,
		"strictatime":         unix.MS_STRICTATIME,
		// mount(2) would let strictatime win over what comes later.
		"strictatime,noatime":                  unix.MS_NOATIME,
		"noatime,strictatime":                  unix.MS_STRICTATIME,
		"noatime,relatime":                     unix.MS_RELATIME,
		"strictatime,nostrictatime":            0,
		"lazytime":                             unix.MS_LAZYTIME,
		"lazytime,nolazytime":                  0,
		"nosymfollow":                          unix.MS_NOSYMFOLLOW,
		"nosymfollow,symfollow":                0,
		"silent":                               unix.MS_SILENT,
		"silent,loud":                          0,
		"ro,nodev,defaults":                    unix.MS_RDONLY | unix.MS_NODEV,
		"user":                                 unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC,
		"user=joe":                             unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC,
		"users,exec":                           unix.MS_NODEV | unix.MS_NOSUID,
		"owner":                                unix.MS_NODEV | unix.MS_NOSUID,
		"group,dev,suid":                       0,
		"nouser,nousers,noowner,nogroup":       0,
		"auto,noauto,_netdev,nofail":           0,
		"comment=a,x-systemd.requires=b,x-y":   0,
		"X-fstrim.notrim,X-mount.mkdir=0755":   0,
		volumeOption + "=" + secret + ",nodev": unix.MS_NODEV,
	} {
		t.Run(opts, func(t *testing.T) {
			ov, err := parseOptions([]string{"lowerdir=/a:/b", opts})
			require.NoError(t, err)
			assert.Equal(t, want, ov.flags)
			assert.Empty(t, ov.other, "nothing of this is overlayfs's")
		})
	}

	for _, opt := range []string{"ro=1", "comment", "users=joe", "Ro", "nofoo", "uidmap=0:1:2"} {
		ov, err := parseOptions([]string{"lowerdir=/a:/b", opt})
		require.NoError(t, err)
		assert.Zero(t, ov.flags, opt)
		assert.Len(t, ov.other, 1, opt)
	}
}

// The tables of fsconfig(2) and fsmount(2) have to know each flag that an
// option can set, or it would be lost without a word.
func TestEveryFlagReachesTheContext(t *testing.T) {
	for _, g := range generics {
		for bit := uintptr(1); bit != 0 && bit <= g.set; bit <<= 1 {
			// relatime is what a mount has by default, and silent is about
			// mount(2)'s own messages.
			if g.set&bit == 0 || bit == unix.MS_RELATIME || bit == unix.MS_SILENT {
				continue
			}
			assert.True(t, len(superFlags(bit)) > 0 || mountAttributes(bit) != 0, "flag %#x of %s", bit, g.name)
		}
	}
}

func TestShow(t *testing.T) {
	assert.Equal(t, "/a/b:c,d", show("/a/b:c,d"))
	assert.Equal(t, `"/a b"`, show("/a b"))
	assert.Equal(t, `"/a\nb"`, show("/a\nb"))
	assert.Equal(t, `""`, show(""))
	assert.Equal(t, `"\xff"`, show("\xff"))

	assert.Equal(t, "redirect_dir", showKey("redirect_dir"))
	for _, key := range []string{"", secret, "a\nb", strings.Repeat("a", 33)} {
		assert.Equal(t, "(not shown)", showKey(key))
	}
}
