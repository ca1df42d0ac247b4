# Prints what a build prints: colours, progress that rewrites its line, long lines, and many of them.
for ((i = 0; i < 300; i++)); do
	printf '\033[32m[%3d%%]\033[0m Building CXX object src/CMakeFiles/thing.dir/file_%d.cpp.o\n' $((i / 3)) $i
	if ((i % 20 == 7)); then
		printf '\033[1msrc/file_%d.cpp:%d:%d: \033[35mwarning: \033[0m\033[1munused variable ‘x’ in a function whose name is long enough to be wrapped, std::vector<std::string>\033[0m [\033[35m-Wunused\033[0m]\n' $i $i 7
		printf '   %d | \033[01;35m\033[Kint x\033[m\033[K = 0;\n     | \033[01;35m\033[K    ^\033[m\033[K\n' $i
	fi
	if ((i % 50 == 49)); then
		for ((j = 0; j <= 100; j += 4)); do
			printf '\rlinking \033[44m%*s\033[m%*s %d%%' $((j / 2)) '' $((50 - j / 2)) '' $j
		done
		printf '\r\033[K\033[1;32mlinked\033[m\n'
	fi
done
